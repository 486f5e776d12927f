#!/usr/bin/env bash
# A picture with curl, and its parameters. Start the server first: vllm serve demo --omni --cache-backend magcache
set -euo pipefail
url=${1:-http://127.0.0.1:8000/v1}
curl -sSf "$url/images/generations" -H 'Content-Type: application/json' \
    -d '{"prompt": "red apple", "seed": 7, "cache": "balanced", "quality": "high"}' |
    python3 -c 'import base64, json, sys
reply = json.load(sys.stdin)
open("apple.png", "wb").write(base64.b64decode(reply["data"][0]["b64_json"]))
print(json.dumps(reply["omni"], indent=1))'
