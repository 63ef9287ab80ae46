"""The guarantee, and the only place that may promise one.

``events`` say what ran and ``accounting`` what it costs; ``ledger`` keeps what was spent;
``mechanism`` and ``per_example`` clip and add noise; ``plan`` makes a promise of settings;
``rldp`` chooses how to clip; ``secagg`` adds up what nobody may see; ``report`` and
``statement`` say it to people, and audits try to refute it.
"""
