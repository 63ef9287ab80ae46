"""Who is who: a small private CA, the server's certificate, nodes' keys, the signed roster."""
