#!/usr/bin/env python3
"""Figures of the control plane's registry: catalog reads, a thousand watchers, ten thousand endpoints, and what a large
catalog costs a proxy. Each figure is of one process, started here on a store of its own; CPU is what the scheduler says
of its threads.

  registry.py --infrar target/release/infrar [--watchers 1000] [--large]
"""
import argparse, glob, json, os, resource, select, signal, socket, subprocess as sp, sys, tempfile, time

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("--infrar", required=True); ap.add_argument("--watchers", type=int, default=1000)
ap.add_argument("--reads", type=int, default=100_000); ap.add_argument("--large", action="store_true", help="with 10,000 services of 10 endpoints too")
A = ap.parse_args(); BIN = os.path.abspath(A.infrar)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(20_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
W = tempfile.mkdtemp(prefix="infrar-registry-"); os.chdir(W); STARTED = []

def port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]

def private(path, text):
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f: f.write(text)

def project(services, endpoints):
    each = {f"s{n:05}": {"scopes": ["use"], "endpoints": [
        {"id": f"e{m}", "url": f"https://e{m}.s{n:05}.example", "provider": "aws", "region": f"region-{m}"} for m in range(endpoints)]} for n in range(services)}
    each["data"] = {"scopes": ["use"]}
    return json.dumps({"project": "shop", "services": each, "permissions": {"web": {"data": ["use"]}},
                       "identities": {n: {"client_secret_file": n} for n in ("web", "data")}})

class Process:
    def __init__(self, *arguments, ready):
        begun = time.monotonic(); self.log = open(f"{arguments[0]}-{len(STARTED)}.log", "w")
        self.p = sp.Popen([BIN, *arguments], stdout=self.log, stderr=self.log); STARTED.append(self)
        while True:
            try:
                s = socket.create_connection(("127.0.0.1", ready)); s.sendall(f"GET /readyz HTTP/1.1\r\nhost: 127.0.0.1:{ready}\r\nconnection: close\r\n\r\n".encode())
                if s.recv(12).endswith(b"200"): break
            except OSError: pass
            if self.p.poll() is not None or time.monotonic() - begun > 60: sys.exit(open(self.log.name).read()[-2000:])
            time.sleep(0.02)
    def status(self, key):
        return next(int(l.split()[1]) / 1024 for l in open(f"/proc/{self.p.pid}/status") if l.startswith(key))
    rss = property(lambda self: self.status("VmRSS")); peak = property(lambda self: self.status("VmHWM"))
    def cpu(self):
        return sum(int(open(t).read().split()[0]) for t in glob.glob(f"/proc/{self.p.pid}/task/*/schedstat")) / 1e9
    def end(self):
        self.p.send_signal(signal.SIGKILL); self.p.wait(); STARTED.remove(self)

class Plane(Process):
    def __init__(self, text):
        self.port = port(); folder = f"d{self.port}"; private("project.yaml", text); private("web", "web's secret"); private("data", "data's secret")
        super().__init__("control", "--project", "project.yaml", "--listen", f"127.0.0.1:{self.port}", "--data-dir", folder, "--read-rate", "0", "--write-rate", "0", ready=self.port)
        get = [BIN, "token", "get", "--control", f"http://127.0.0.1:{self.port}", "--client-id", "data", "--client-secret-file", "data"]
        self.token = sp.run(get, capture_output=True, text=True, check=True).stdout.strip()
    def connect(self):
        s = socket.create_connection(("127.0.0.1", self.port)); s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1); return s
    def request(self, method, path, headers=(), body=b""):
        lines = [f"{method} {path} HTTP/1.1", "host: x", f"authorization: Bearer {self.token}", f"content-length: {len(body)}", *headers]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    def ask(self, s, *request):
        s.sendall(self.request(*request)); head = b""
        while b"\r\n\r\n" not in head: head += s.recv(65536)
        head, _, body = head.partition(b"\r\n\r\n"); low = head.lower()
        length = int(low.split(b"content-length: ")[1].split(b"\r\n")[0]) if b"content-length: " in low else 0
        parts, got = [body], len(body)
        while got < length: parts.append(s.recv(1 << 20)); got += len(parts[-1])
        return int(head.split()[1]), low, b"".join(parts)
    def register(self, s, n, weight=100):
        body = json.dumps({"url": f"https://n{n}.data.example", "place": "aws/us-east-1", "ttl_seconds": 3600, "weight": weight}).encode()
        status, _, text = self.ask(s, "PUT", f"/v1/services/data/endpoints/n{n}", (), body); assert status in (200, 201), (status, text)

def reads(plane):
    s = plane.connect(); status, head, body = plane.ask(s, "GET", "/v1/catalog"); assert status == 200
    etag = head.split(b"etag: ")[1].split(b"\r\n")[0].decode()
    one = plane.request("GET", "/v1/catalog", (f"if-none-match: {etag}",)); batch = 50
    status, head, _ = plane.ask(s, "GET", "/v1/catalog", (f"if-none-match: {etag}",)); assert status == 304
    for pipelined in (1, batch):
        count, before, begun = A.reads // (1 if pipelined > 1 else 5), plane.cpu(), time.monotonic()
        for _ in range(count // pipelined):
            s.sendall(one * pipelined); answers = 0; tail = b""
            while answers < pipelined:
                text = tail + s.recv(1 << 18); answers += text.count(b"\r\n\r\n"); tail = text[-3:] if not text.endswith(b"\r\n\r\n") else b""
        cpu, took = plane.cpu() - before, time.monotonic() - begun
        print(f"  catalog with matching ETag, {pipelined} at a time: {count / cpu:,.0f}/s per core ({cpu / count * 1e6:.1f} µs each; {count / took:,.0f}/s seen by one client)")
    return len(body)

def watchers(plane, count):
    before, poll, each = plane.rss, select.epoll(), {}
    for _ in range(count):
        s = plane.connect(); s.sendall(plane.request("GET", "/v1/watch?from=999999999", ("accept: text/event-stream",))); each[s.fileno()] = s; poll.register(s, select.EPOLLIN)
    def heard(mark, at):
        waiting = dict.fromkeys(each, b"")
        while waiting:
            for fd, _ in poll.poll(20):
                text = waiting.get(fd, b"") + each[fd].recv(65536)
                if mark in text: waiting.pop(fd, None)
                elif fd in waiting: waiting[fd] = text[-65536:]
        return time.monotonic() - at
    heard(b"event: resync", 0); time.sleep(1)
    print(f"  {count} watchers: {plane.rss - before:.1f} MiB more, {plane.rss:.1f} MiB in all")
    s = plane.connect(); took, used = [], []
    for n in range(5):
        cpu, begun = plane.cpu(), time.monotonic(); plane.register(s, 0, n + 1); took.append(heard(b"event: change", begun)); used.append(plane.cpu() - cpu)
    print(f"  a change, committed and at the last of them: {max(took) * 1e3:.0f} ms at most of {len(took)}, {sum(used) / len(used) * 1e3:.0f} ms of CPU; then {plane.rss:.1f} MiB")
    for s in each.values(): s.close()

def registering(plane, count, lanes=64):
    sockets = [plane.connect() for _ in range(lanes)]; poll = select.epoll(); by = {s.fileno(): s for s in sockets}; next_ = iter(range(1, count + 1)); open_ = set(); failed = 0
    def put(s):
        n = next(next_, None)
        if n is None: open_.discard(s.fileno()); return
        body = json.dumps({"url": f"https://n{n}.data.example", "place": "aws/us-east-1", "ttl_seconds": 3600}).encode()
        s.sendall(plane.request("PUT", f"/v1/services/data/endpoints/n{n}", (), body)); open_.add(s.fileno())
    cpu, begun = plane.cpu(), time.monotonic()
    for s in sockets: poll.register(s, select.EPOLLIN); put(s)
    while open_:
        for fd, _ in poll.poll(20):
            text = by[fd].recv(65536); failed += not text.startswith(b"HTTP/1.1 201"); put(by[fd])
    took, cpu = time.monotonic() - begun, plane.cpu() - cpu
    print(f"  {count} endpoints registered over {lanes} connections: {count / took:,.0f}/s ({cpu / count * 1e3:.2f} ms of CPU each), {failed} failed; {plane.rss:.1f} MiB, peak {plane.peak:.1f}")

def proxy(plane, name):
    out, admin = port(), port()
    private(f"{name}.yaml", f"service: web\nplace: aws_us_east_1\ncontrol: {{ url: 'http://127.0.0.1:{plane.port}', state_dir: {name}, credential: {{ client_secret_file: web }} }}\n"
            f"outbound: {{ listen: '127.0.0.1:{out}' }}\nadmin: {{ listen: '127.0.0.1:{admin}' }}\n")
    return Process("proxy", "--config", f"{name}.yaml", ready=admin)

def served(plane, p, s, n):
    before = p.cpu(); plane.register(s, 0, n); time.sleep(1.5); return p.cpu() - before

try:
    print("small project"); plane = Plane(project(1, 1)); time.sleep(2)
    print(f"  idle: {plane.rss:.1f} MiB"); cpu = plane.cpu(); time.sleep(5); print(f"  idle: {(plane.cpu() - cpu) / 5 * 100:.2f} % of a core")
    reads(plane); watchers(plane, A.watchers)
    p = proxy(plane, "small"); time.sleep(1); small = p.rss; s = plane.connect(); quiet = [served(plane, p, s, n) for n in range(1, 4)]
    print(f"  a proxy: {small:.1f} MiB; {min(quiet) * 1e3:.1f} ms of CPU in 1.5 s with one change"); p.end(); plane.end()
    print("10,000 endpoints that register"); plane = Plane(project(1, 1)); registering(plane, 10_000); size = reads(plane); print(f"  catalog: {size / 1e6:.1f} MB"); watchers(plane, A.watchers); plane.end()
    sizes = [(1_000, 10)] + [(10_000, 10)] * A.large
    for services, endpoints in sizes:
        print(f"{services} services of {endpoints} endpoints"); plane = Plane(project(services, endpoints)); time.sleep(1)
        print(f"  {plane.rss:.1f} MiB, peak {plane.peak:.1f}"); size = reads(plane); print(f"  catalog: {size / 1e6:.1f} MB; then {plane.rss:.1f} MiB")
        watchers(plane, A.watchers); p = proxy(plane, f"proxy{services}"); time.sleep(3)
        s = plane.connect(); costs = [served(plane, p, s, n) for n in range(1, 6)]
        print(f"  a proxy: {p.rss:.1f} MiB ({p.rss - small:.1f} more than with the small one, peak {p.peak:.1f}); a change: {sorted(costs)[2] * 1e3:.1f} ms of CPU"); p.end(); plane.end()
finally:
    for one in list(STARTED): one.end()
