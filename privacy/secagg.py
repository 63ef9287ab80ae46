"""Secure sums: the server learns the sum of many vectors, or nothing.

The protocol is Bonawitz et al. 2017 (CCS, eprint 2017/281) with the ring of Bell et al.
2020 (eprint 2020/704) above 50 members. In one attempt, for one round of one job:

1. *advert.* Every member draws fresh keys and signs their public halves with its
   long-term Ed25519 key, for this job, round, attempt, model and length.
2. *deal.* The server shows all adverts to all. Each member checks every one of them, and
   deals shares of two secrets to its neighbours, sealed for each: the seed of the mask
   that it puts on by itself, and the private key behind its masks with others.
3. *mask.* Each adds its own mask and, with opposite signs, a mask for each neighbour that
   dealt; it signs whose shares it saw. The server adds up what comes.
4. *sign.* The server names the survivors: those whose vectors are in the sum. Each
   survivor checks that they are enough for everybody's floor and all saw the same
   dealers, and signs the set; once.
5. *reveal.* Each survivor checks that a quorum signed the very same set, and reveals for
   a survivor the share of its own mask's seed, for one that dropped out the share of its
   private key. From these the server takes all masks off the sum.

What it holds up: a server that does not follow the protocol, together with members
fewer than ``2 t - n`` (``t`` the quorum of ``n``; one in five above 50 members), learns
the sum of the survivors' vectors and nothing else about them. What it does not: the sum
itself (noise does), vectors that are wrong on purpose, members that stop the round, who
talks when and how much, and two attempts with the same values: see ``Member.exposed``.

Examples
--------
>>> import numpy as np
>>> from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
>>> signers = {name: Ed25519PrivateKey.generate() for name in ("ada", "bob", "eve")}
>>> roster = {name: signer.public_key() for name, signer in signers.items()}
>>> context = Context("job", round=1, attempt=0, model=bytes(32), length=2)
>>> members = {name: Member(context, name, signers[name], roster) for name in signers}
>>> server = Collector(context, roster)
>>> for name, member in members.items():
...     server.take_advert(name, member.advert())
>>> for name, member in members.items():
...     server.take_deal(name, member.deal(server.cohort()))
>>> for name, values in {"ada": [1, -2], "bob": [30, 40]}.items():  # eve drops out
...     field = to_field(np.array(values), cohort=3, most_abs=1000)
...     server.add(name, members[name].mask(field, server.dealt_for(name)))
>>> for name in server.summed():
...     server.take_signature(name, members[name].sign(server.survivors()))
>>> for name in server.summed():
...     server.take_reveal(name, members[name].reveal(server.signed()))
>>> from_field(server.total())
array([31, 38])
"""

from __future__ import annotations

from fedtune.privacy.secagg_collector import Collector
from fedtune.privacy.secagg_field import from_field, tail_of, to_field
from fedtune.privacy.secagg_graph import degree_of, threshold_of
from fedtune.privacy.secagg_member import Member
from fedtune.privacy.secagg_records import (
    MOST_LENGTH,
    MOST_MEMBERS,
    NAME_BYTES,
    Context,
    Record,
)

__all__ = [
    "MOST_LENGTH",
    "MOST_MEMBERS",
    "NAME_BYTES",
    "Collector",
    "Context",
    "Member",
    "Record",
    "degree_of",
    "from_field",
    "tail_of",
    "threshold_of",
    "to_field",
]
