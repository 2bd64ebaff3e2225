"""Profiles in vLLM, as a plugin: `--additional-config '{"ffnskip_profile": "profile.yaml"}'` (docs/vllm.md).

`plugin` is what vLLM calls and the only module that imports vLLM; `layers` puts a profile on its decoder layers,
`requests` tells which tokens of a batch were generated, and `through` is the operator that graphs see.
"""
