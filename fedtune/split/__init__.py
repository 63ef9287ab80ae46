"""The cut of a split model: head and tail at the client, the body at the server."""
