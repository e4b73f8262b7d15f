"""requests, told of the proxy by HTTP_PROXY alone."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import requests

NAME = "http://data-intelligence"


def headers(answer: requests.Response) -> dict[str, str]:
    joined: dict[str, str] = {}
    for name, value in answer.json()["headers"]:
        joined[name] = f"{joined[name]}, {value}" if name in joined else value
    return joined


session = requests.Session()

# The path, query, method and body arrive unchanged.
answer = session.post(NAME + "/query/a%2Fb/%3Bc?x=1&y=%20z&y=", json={"question": 42})
assert answer.status_code == 200, answer.text
seen = answer.json()
assert seen["method"] == "POST", seen
assert seen["target"] == "/query/a%2Fb/%3Bc?x=1&y=%20z&y=", seen
assert seen["text"] == '{"question": 42}', seen

# The callee's proxy says who called, whatever the caller claims.
seen = headers(session.get(NAME + "/query", headers={"infrar-caller": "root", "infrar-scopes": "all"}))
assert seen["infrar-caller"] == "web-application", seen
assert set(seen["infrar-scopes"].split()) == {"read:data", "write:query"}, seen
assert seen["authorization"].startswith("Bearer "), "no token reached the callee"
assert "data-intelligence" in seen["forwarded"], seen
assert "traceparent" in seen and "x-request-id" in seen, seen
assert "proxy-connection" not in seen, seen

# A body of unknown length is streamed; a large answer comes whole.
blocks = [bytes([n]) * 65536 for n in range(64)]
seen = session.post(NAME + "/query", data=iter(blocks)).json()
assert (seen["length"], seen["sha256"]) == (4 << 20, hashlib.sha256(b"".join(blocks)).hexdigest()), seen
large = session.get(NAME + "/large?n=5000001").content
assert len(large) == 5000001 and large[:300] == (bytes(range(256)) * 2)[:300]

# HEAD has a length and no body; a status of the service is passed on as it is.
assert session.head(NAME + "/query").content == b""
assert [session.get(f"{NAME}/status/{code}").status_code for code in (201, 404, 418, 500)] == [201, 404, 418, 500]

# Many at once, over kept connections.
with ThreadPoolExecutor(16) as pool:
    codes = list(pool.map(lambda n: session.put(f"{NAME}/query?n={n}", data=b"x" * n).json()["length"], range(200)))
assert codes == list(range(200)), codes

# What is no service is refused, with what was perhaps meant.
refused = session.get("http://data-inteligence/query")
assert refused.status_code == 404, refused.text
assert refused.headers["content-type"] == "application/problem+json"
assert refused.headers["proxy-status"] == "infrar; error=destination_not_found", refused.headers
assert refused.json()["code"] == "unknown-service" and "data-intelligence" in refused.json()["nearest"], refused.text

assert os.environ["HTTP_PROXY"].startswith("http://127.0.0.1:")
print("told")
