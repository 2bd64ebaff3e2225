"""`python -m ffnskip.profiles` prints the JSON Schema of a profile."""

import json

from ffnskip.profiles.profile import json_schema

print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
