"""httpx, told of the proxy by HTTP_PROXY; and its HTTP/2 with prior knowledge."""

import os

import httpx

NAME = "http://data-intelligence"

with httpx.Client() as client:
    answer = client.post(NAME + "/query?x=1", content=b"plain", headers={"content-type": "text/plain"})
    assert answer.status_code == 200 and answer.json()["text"] == "plain", answer.text
    assert dict(answer.json()["headers"])["infrar-caller"] == "web-application"

    # Each line is answered before the next is sent: neither direction waits for the other to end.
    said = iter([b"one\n", b"two\n", b"three\n"])
    with client.stream("POST", NAME + "/lines", content=said) as conversation:
        assert [line for line in conversation.iter_lines()] == ["heard one", "heard two", "heard three"]

    with client.stream("GET", NAME + "/large?n=3000000") as download:
        assert sum(len(part) for part in download.iter_bytes()) == 3000000

# Prior knowledge: HTTP/2 to the outbound port, the service in :authority.
outbound = os.environ["OUTBOUND"]
with httpx.Client(http1=False, http2=True, trust_env=False) as client:
    for n in range(20):
        answer = client.post(f"http://{outbound}/query?n={n}", content=b"y" * n, headers={"host": "data-intelligence"})
        assert answer.http_version == "HTTP/2", answer.http_version
        assert answer.status_code == 200, answer.text
        assert (answer.json()["length"], answer.json()["target"]) == (n, f"/query?n={n}"), answer.text

print("told")
