"""The oracle: does AWSCURRENT log in, at every instant? It shares no code with the broker: grpcio with what is generated
from proto/claviger/v1, and PostgreSQL's own libpq.

    python oracle.py --socket SOCKET --environment ENVIRONMENT --name NAME --host HOST --port PORT --dbname DBNAME
                     --table TABLE [--users USER,USER] [--sslmode MODE] [--sslrootcert FILE]
                     [--every MILLISECONDS] [--grace MILLISECONDS] [--history FILE]

Every 50 ms it reads AWSCURRENT of a secret, whose value is a JSON object with `username` and `password`, logs in with it
on a fresh connection that must demand SCRAM, and there does what only the table's owner may do: a row for the version
into TABLE, and a comment on it. Host, port and database are its own arguments and not the secret's.

It prints `ready` after the first login. Then it takes lines on standard input:

    seen VERSION    prints `seen VERSION` once it has logged in with that version
    more NUMBER     prints `more NUMBER` once it has logged in so often from now on
    back            the next change may lead back to a version that was current before: somebody rolls back
    stop            (or the end of the input) prints one JSON object, and ends

    logins        successful ones
    failed        with a value that was read and not held for longer than --grace: what must never happen
    late          as failed, but of a value that was held for longer, and that was not current any more
    unreachable   the server could not be asked: away, starting, ending
    reads_failed  the broker could not be asked, or its store: away, stopped
    refused       the broker said no
    versions      those that were read, in the order in which they came
    longest_gap   the longest time between two logins, in milliseconds
    wrong         what else is not as it should be: names mixed, values changed, versions that came back

With --history each turn is a line of JSON: time, version, and `ok` or why not. No value is in it.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import queue
import sys
import tempfile
import threading
import time

import grpc
import grpc_tools
import psycopg
from grpc_tools import protoc
from psycopg import sql

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"
# How long one read or one login may take before it counts as not possible.
BOUND = 10
# Of each kind of trouble, so many are described.
MOST_DESCRIBED = 5
# The broker, or its store, could not be asked. Everything else that goes wrong is an answer.
AWAY = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
# What libpq says where the server did not get to look at the password. It translates nothing in the locale C.
NOT_ASKED = (
    "Connection refused",
    "Connection reset",
    "No such file or directory",
    "timeout expired",
    "timed out",
    "server closed the connection unexpectedly",
    "SSL SYSCALL error",
    "could not receive data",
    "could not send data",
    "the database system is",
    "terminating connection due to",
)


def main():
    arguments = parse()
    os.environ["LC_ALL"] = "C"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        generate(folder)
        history = stack.enter_context(open(arguments.history, "w")) if arguments.history else None
        oracle = Oracle(arguments, history)
        stack.callback(oracle.close)
        orders = queue.Queue()
        threading.Thread(target=listen, args=(orders,), daemon=True).start()
        oracle.run(orders)
        print(json.dumps(oracle.account()), flush=True)


def parse():
    parser = argparse.ArgumentParser(description="does AWSCURRENT log in, at every instant?", allow_abbrev=False)
    for name in ("socket", "environment", "name", "host", "port", "dbname", "table"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--users", type=lambda text: text.split(","), default=[])
    parser.add_argument("--sslmode", default="disable")
    parser.add_argument("--sslrootcert", default="")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--grace", type=int, default=250)
    parser.add_argument("--history")
    return parser.parse_args()


def generate(folder):
    """Generates the messages and stubs into a folder, and makes them importable."""
    well_known = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    files = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("claviger/v1/secret.proto"))
    arguments = ["protoc", f"-I{PROTO}", f"-I{well_known}", f"--python_out={folder}", f"--grpc_python_out={folder}"]
    if protoc.main([*arguments, *files]) != 0:
        sys.exit("the protos can't be compiled, see above")
    sys.path.insert(0, folder)


def listen(orders):
    for line in sys.stdin:
        orders.put(line.split())
    orders.put(["stop"])


class Broker:
    """AWSCURRENT, as any caller gets it."""

    def __init__(self, arguments):
        from claviger.v1 import secret_pb2, secret_pb2_grpc

        self.request = secret_pb2.GetSecretRequest(environment=arguments.environment, name=arguments.name)
        # A broker that was killed is asked again as soon as it is back. The name in a socket's path is no name of a
        # host, which HTTP/2 wants.
        options = [
            ("grpc.default_authority", "localhost"),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 200),
        ]
        self.channel = grpc.insecure_channel(f"unix://{pathlib.Path(arguments.socket).resolve()}", options)
        self.secrets = secret_pb2_grpc.SecretServiceStub(self.channel)

    def read(self):
        return self.secrets.GetSecret(self.request, timeout=BOUND).secret


class Target:
    """A login, and what only the owner may do."""

    def __init__(self, arguments):
        self.parameters = {
            "host": arguments.host,
            "port": arguments.port,
            "dbname": arguments.dbname,
            "sslmode": arguments.sslmode,
            "sslrootcert": arguments.sslrootcert,
            "connect_timeout": BOUND,
            # A server that lets anyone in proves nothing.
            "require_auth": "scram-sha-256",
            "application_name": "oracle",
        }
        if not arguments.sslrootcert:
            del self.parameters["sslrootcert"]
        self.table = sql.Identifier(*arguments.table.split("."))

    def use(self, username, password, version):
        with psycopg.connect(**self.parameters, user=username, password=password) as connection:
            insert = sql.SQL("INSERT INTO {} (version) VALUES (%s)").format(self.table)
            connection.execute(insert, [version])
            comment = sql.SQL("COMMENT ON TABLE {} IS {}").format(self.table, sql.Literal(version))
            connection.execute(comment)


class Oracle:
    def __init__(self, arguments, history):
        self.broker = Broker(arguments)
        self.target = Target(arguments)
        self.users = arguments.users
        self.every = arguments.every / 1000
        self.grace = arguments.grace / 1000
        self.history = history
        self.counts = dict.fromkeys(("logins", "failed", "late", "unreachable", "reads_failed", "refused"), 0)
        self.described = {}
        self.wrong = []
        self.versions = []
        self.proven = set()
        self.current = None
        self.back = False
        self.longest_gap = 0
        self.last_login = None
        self.waiting = []
        # Values are told apart without being kept.
        self.salt = os.urandom(16)
        self.values = {}
        self.owners = {}

    def close(self):
        self.broker.channel.close()

    def run(self, orders):
        due = time.monotonic()
        while True:
            try:
                order = orders.get(timeout=max(0, due - time.monotonic()))
            except queue.Empty:
                self.turn()
                # One that came late is not made up for: turns never come in a bunch.
                due = max(due + self.every, time.monotonic())
                continue
            if not self.obey(order):
                return

    def obey(self, order):
        """Whether to go on."""
        match order:
            case ["stop"]:
                return False
            case ["back"]:
                self.back = True
            case ["seen", version]:
                self.waiting.append((f"seen {version}", lambda: version in self.proven))
                self.tell()
            case ["more", number]:
                enough = self.counts["logins"] + int(number)
                self.waiting.append((f"more {number}", lambda: self.counts["logins"] >= enough))
            case []:
                pass
            case _:
                sys.exit(f"no such order: {order}")
        return True

    def tell(self):
        """Says what was asked for and has come true."""
        for what, is_so in self.waiting:
            if is_so():
                print(what, flush=True)
        self.waiting = [(what, is_so) for what, is_so in self.waiting if not is_so()]

    def turn(self):
        asked = time.monotonic()
        try:
            secret = self.broker.read()
        except grpc.RpcError as error:
            kind = "reads_failed" if error.code() in AWAY else "refused"
            self.count(kind, None, f"{error.code().name}: {error.details()}")
            return
        version = secret.version_id
        try:
            value = json.loads(secret.payload.data)
            username, password = value["username"], value["password"]
        except (ValueError, KeyError, TypeError) as error:
            self.count("failed", version, f"the value is no credential: {type(error).__name__}")
            return
        self.compare(version, username, password, secret.payload.data)
        self.log_in(version, username, password, asked)

    def log_in(self, version, username, password, asked):
        try:
            self.target.use(username, password, version)
        except psycopg.Error as error:
            why = " ".join(str(error).split())
            assert password not in why, "libpq told the password"
            held = time.monotonic() - asked
            if any(text in why for text in NOT_ASKED):
                self.count("unreachable", version, why)
            elif held > self.grace and self.is_superseded(version):
                self.count("late", version, f"held for {held:.3f} s: {why}")
            else:
                self.count("failed", version, f"held for {held:.3f} s: {why}")
            return
        now = time.monotonic()
        if self.last_login is not None:
            self.longest_gap = max(self.longest_gap, now - self.last_login)
        else:
            print("ready", flush=True)
        self.last_login = now
        self.proven.add(version)
        self.count("logins", version, "ok")
        self.tell()

    def is_superseded(self, version):
        """Whether another version is current by now. A broker that is away is waited for: only it can tell."""
        end = time.monotonic() + BOUND
        while time.monotonic() < end:
            with contextlib.suppress(grpc.RpcError):
                return self.broker.read().version_id != version
            time.sleep(self.every)
        return False

    def compare(self, version, username, password, data):
        """What must hold of what was read, whatever it is good for."""
        value, key = self.blur(data), self.blur(password.encode())
        if self.values.setdefault(version, value) != value:
            self.object(f"version {version} changed its value")
        if self.owners.setdefault(key, username) != username:
            self.object(f"version {version} gives {username} the password of {self.owners[key]}")
        if self.users and username not in self.users:
            self.object(f"version {version} is of {username}")
        if version == self.current:
            return
        if version in self.versions:
            if not self.back:
                self.object(f"version {version} came back after {self.current}")
            self.back = False
        elif len(self.users) == 2 and self.versions and self.last_user == username:
            self.unseen_between(version)
        self.versions.append(version)
        self.current = version
        self.last_user = username

    def unseen_between(self, version):
        """Two users take turns; of the same one twice, a version in between was never read, which is no fault."""
        self.describe("skipped", f"before {version}")

    def blur(self, data):
        return hashlib.blake2b(data, key=self.salt, digest_size=16).digest()

    def object(self, what):
        if what not in self.wrong:
            self.wrong.append(what)

    def count(self, kind, version, why):
        self.counts[kind] += 1
        if kind != "logins":
            self.describe(kind, f"{version}: {why}" if version else why)
        if self.history:
            line = {"time": time.time(), "version": version, "kind": kind, "why": why}
            self.history.write(json.dumps(line) + "\n")
            self.history.flush()

    def describe(self, kind, what):
        said = self.described.setdefault(kind, [])
        if len(said) < MOST_DESCRIBED:
            said.append(what)

    def account(self):
        return {
            **self.counts,
            "versions": self.versions,
            "longest_gap": round(self.longest_gap * 1000),
            "wrong": self.wrong,
            "described": self.described,
        }


if __name__ == "__main__":
    main()
