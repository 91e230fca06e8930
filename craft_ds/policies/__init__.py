"""Policies: loss per token, files, sharding units, and the embedded tiny pi0_fast.

Importing any module of this package registers the policy type `tiny_pi0_fast` and the token-weighted loss
of pi0_fast.
"""

import craft_ds.policies.pi0_fast.loss
import craft_ds.policies.tiny_pi0_fast.policy  # noqa: F401
