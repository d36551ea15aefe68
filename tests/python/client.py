"""A client in Python: grpcio, and code generated from proto/claviger/v1 alone. It shares nothing with the Rust one.

    python client.py SOCKET [ADDRESS]

SOCKET is the Unix socket of a broker on which the caller is an administrator, ADDRESS its loopback TCP address
(HOST:PORT); both are those of `claviger dev --listen`. What is checked is printed, one line each. The first thing that
is not as it should be ends the program.
"""

import contextlib
import pathlib
import queue
import sys
import tempfile
import threading
import uuid

import grpc
import grpc_tools
from grpc_tools import protoc

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"
# How long anything may take before it is called hung. Never what is waited for.
HUNG = 60
ENVIRONMENT = "development"
CONSUMER = "python"


def generate(folder):
    """Generates the messages and stubs into a folder, and makes them importable."""
    well_known = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    files = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("claviger/v1/*.proto"))
    arguments = ["protoc", f"-I{PROTO}", f"-I{well_known}", f"--python_out={folder}", f"--grpc_python_out={folder}"]
    if protoc.main([*arguments, *files]) != 0:
        sys.exit("the protos can't be compiled, see above")
    sys.path.insert(0, folder)


def main(socket, address=None):
    with tempfile.TemporaryDirectory() as folder:
        generate(folder)
        checks = Checks(socket, address)
        with contextlib.closing(checks):
            for check in Checks.ALL:
                check(checks)
                print("ok", check.__doc__.removesuffix("."), flush=True)


def error_info(error):
    """The google.rpc.ErrorInfo of a failed call, which travels as binary metadata."""
    from google.rpc import error_details_pb2, status_pb2

    metadata = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert status.code == error.code().value[0], "the status in the details is the status of the call"
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details), "there is an ErrorInfo among the details"
    assert info.domain == "claviger", info.domain
    return info


@contextlib.contextmanager
def fails(code, reason):
    """What is inside ends with this status and reason."""
    try:
        yield
    except grpc.RpcError as error:
        assert error.code() == code, f"{error.code()} instead of {code}: {error.details()}"
        info = error_info(error)
        assert info.reason == reason, f"{info.reason} instead of {reason}"
        assert uuid.UUID(info.metadata["request_id"]), "the request can be found in the audit log"
    else:
        raise AssertionError(f"no error, where {reason} was expected")


class Watch:
    """A watch, read by a thread of its own, so that waiting for an event can be given up."""

    def __init__(self, call):
        self.call = call
        self.events = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        try:
            for event in self.call:
                self.events.put(event)
        except grpc.RpcError as error:
            self.events.put(error)

    def next(self):
        """The next thing that is told, but for signs of life."""
        while True:
            event = self.events.get(timeout=HUNG)
            if isinstance(event, grpc.RpcError):
                raise event
            if event.WhichOneof("event") != "progress":
                return event

    def changed(self, version_id):
        """The next change that is told, which must be to this version."""
        event = self.next()
        assert event.WhichOneof("event") == "changed", event.WhichOneof("event")
        secret = event.changed.secret
        assert secret.version_id == version_id, (secret.version_id, version_id)
        return event.revision, secret


class Checks:
    ALL = []

    def __init__(self, socket, address):
        from claviger.v1 import secret_pb2, secret_pb2_grpc, token_pb2, token_pb2_grpc

        self.proto = secret_pb2
        self.token_proto = token_pb2
        # The name in a socket's path is no name of a host, which HTTP/2 wants.
        options = [("grpc.default_authority", "localhost")]
        self.channels = [grpc.insecure_channel(f"unix://{pathlib.Path(socket).resolve()}", options)]
        self.secrets = secret_pb2_grpc.SecretServiceStub(self.channels[0])
        self.tokens = token_pb2_grpc.TokenServiceStub(self.channels[0])
        self.over_tcp = None
        if address:
            # Loopback is nothing that a proxy could reach.
            self.channels.append(grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]))
            self.over_tcp = secret_pb2_grpc.SecretServiceStub(self.channels[1])
        # Of this run alone, should the broker have seen another.
        self.name = f"python/{uuid.uuid4()}"

    def close(self):
        for channel in self.channels:
            channel.close()

    def put(self, name, data, token=None, **more):
        payload = self.proto.SecretPayload(data=data, content_type=self.proto.CONTENT_TYPE_TEXT)
        request = self.proto.PutSecretRequest(
            environment=ENVIRONMENT, name=name, payload=payload, client_request_token=token or str(uuid.uuid4()), **more
        )
        return self.secrets.PutSecret(request, timeout=HUNG)

    def get(self, name, stub=None, metadata=None, environment=ENVIRONMENT, **more):
        request = self.proto.GetSecretRequest(environment=environment, name=name, **more)
        answer = (stub or self.secrets).GetSecret(request, timeout=HUNG, metadata=metadata)
        return answer.secret

    def watch(self, **more):
        request = self.proto.WatchSecretsRequest(
            environment=ENVIRONMENT, names=[self.name], consumer=CONSUMER, with_values=True, **more
        )
        watch = Watch(self.secrets.WatchSecrets(request))
        assert watch.next().WhichOneof("event") == "started", "a watch says first that it is in place"
        return watch


def check(function):
    """One thing to check; its description is what is printed."""
    Checks.ALL.append(function)
    return function


@check
def put_and_get(self):
    """PutSecret and GetSecret: value, version and label."""
    written = self.put(self.name, b'{"user":"app","port":5432}')
    assert written.changed
    secret = self.get(self.name)
    assert secret.payload.data == b'{"user":"app","port":5432}', "the value is the one that was put"
    assert secret.payload.content_type == self.proto.CONTENT_TYPE_TEXT
    assert secret.version_id == written.version.version_id
    assert list(secret.labels) == ["AWSCURRENT"], secret.labels
    assert (secret.environment, secret.name, secret.stale) == (ENVIRONMENT, self.name, False)
    assert secret.created_at.ToDatetime().year >= 2024, secret.created_at


@check
def fields(self):
    """GetSecret of one field."""
    secret = self.get(self.name, field="port")
    assert (secret.field, secret.payload.data) == ("port", b"5432")
    with fails(grpc.StatusCode.NOT_FOUND, "FIELD_NOT_FOUND"):
        self.get(self.name, field="nope")


@check
def unchanged(self):
    """GetSecret with if_version_id: no value where nothing changed."""
    known = self.get(self.name).version_id
    again = self.get(self.name, if_version_id=known)
    assert again.unchanged and not again.HasField("payload"), "an unchanged secret is told without its value"
    other = self.get(self.name, if_version_id=str(uuid.uuid4()))
    assert not other.unchanged and other.HasField("payload")


@check
def put_twice(self):
    """PutSecret again with the same token: done once; with another value: refused."""
    token = str(uuid.uuid4())
    assert self.put(self.name, b'{"port":1}', token).changed
    again = self.put(self.name, b'{"port":1}', token)
    assert (again.changed, again.version.version_id) == (False, token)
    with fails(grpc.StatusCode.ALREADY_EXISTS, "TOKEN_REUSED"):
        self.put(self.name, b'{"port":2}', token)
    with fails(grpc.StatusCode.ABORTED, "CONFLICT"):
        self.put(self.name, b'{"port":3}', must_not_exist=True)


@check
def batch(self):
    """BatchGetSecrets: a result for each item, in order."""
    query = self.proto.SecretQuery
    items = [
        query(environment=ENVIRONMENT, name=self.name, field="port"),
        query(environment=ENVIRONMENT, name="python/never-was"),
        query(environment=ENVIRONMENT, name="a//b"),
        query(environment=ENVIRONMENT, name=self.name, selector=self.proto.Selector(label="AWSPREVIOUS")),
    ]
    answer = self.secrets.BatchGetSecrets(self.proto.BatchGetSecretsRequest(items=items), timeout=HUNG)
    told = [
        result.secret.payload.data if result.HasField("secret") else (result.problem.code, result.problem.reason)
        for result in answer.results
    ]
    not_found, invalid = grpc.StatusCode.NOT_FOUND.value[0], grpc.StatusCode.INVALID_ARGUMENT.value[0]
    expected = [b"1", (not_found, "SECRET_NOT_FOUND"), (invalid, "INVALID_NAME"), b'{"user":"app","port":5432}']
    assert told == expected, [type(one) for one in told]


@check
def errors(self):
    """Errors carry google.rpc.ErrorInfo: domain, reason and request id."""
    with fails(grpc.StatusCode.NOT_FOUND, "SECRET_NOT_FOUND"):
        self.get("python/never-was")
    with fails(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ENVIRONMENT"):
        self.get(self.name, environment="Production")
    with fails(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"):
        self.get(self.name, reason="x" * 513)


@check
def watching(self):
    """WatchSecrets: the version that is, then each one that becomes current."""
    watch = self.watch()
    _, secret = watch.changed(self.get(self.name).version_id)
    assert secret.payload.data == b'{"port":1}'
    written = self.put(self.name, b'{"port":4}')
    self.revision, secret = watch.changed(written.version.version_id)
    assert secret.payload.data == b'{"port":4}', "the value comes with the change"
    watch.call.cancel()


@check
def resuming(self):
    """WatchSecrets after a revision: only what changed since."""
    written = self.put(self.name, b'{"port":5}')
    watch = self.watch(after_revision=self.revision)
    watch.changed(written.version.version_id)
    request = self.proto.DeleteSecretRequest(environment=ENVIRONMENT, name=self.name)
    self.secrets.DeleteSecret(request, timeout=HUNG)
    gone = watch.next()
    assert gone.WhichOneof("event") == "gone" and gone.gone.name == self.name, gone.WhichOneof("event")
    request = self.proto.RestoreSecretRequest(environment=ENVIRONMENT, name=self.name)
    self.secrets.RestoreSecret(request, timeout=HUNG)
    watch.changed(written.version.version_id)
    watch.call.cancel()


@check
def in_use(self):
    """ReportVersionInUse and ListConsumers."""
    current = self.get(self.name).version_id
    watch = self.watch()
    request = self.proto.ReportVersionInUseRequest(
        environment=ENVIRONMENT, name=self.name, consumer=CONSUMER, version_id=current
    )
    assert self.secrets.ReportVersionInUse(request, timeout=HUNG).current
    request = self.proto.ListConsumersRequest(environment=ENVIRONMENT, name=self.name)
    consumers = self.secrets.ListConsumers(request, timeout=HUNG).consumers
    found = [consumer for consumer in consumers if consumer.name == CONSUMER]
    assert len(found) == 1, [consumer.name for consumer in consumers]
    assert (found[0].version_id, found[0].current, found[0].watching) == (current, True, True)
    assert found[0].HasField("since") and found[0].principal, "whoever reported is known"
    watch.call.cancel()


@check
def tokens(self):
    """A token over TCP: what policy permits, PERMISSION_DENIED for the rest, UNAUTHENTICATED without one."""
    if self.over_tcp is None:
        return
    from claviger.v1 import policy_pb2

    subject = policy_pb2.Subject(
        kind=policy_pb2.PRINCIPAL_KIND_WORKLOAD, id="python", groups=["service-development"]
    )
    request = self.token_proto.CreateTokenRequest(subject=subject)
    request.expires_in.FromSeconds(3600)
    created = self.tokens.CreateToken(request, timeout=HUNG)
    bearer = [("authorization", f"Bearer {created.secret}")]
    assert self.get(self.name, self.over_tcp, bearer, field="port").payload.data == b"5"
    with fails(grpc.StatusCode.PERMISSION_DENIED, "DENIED"):
        self.get("jwt", self.over_tcp, bearer, environment="production")
    with fails(grpc.StatusCode.PERMISSION_DENIED, "DENIED"):
        self.get("never-was", self.over_tcp, bearer, environment="production")
    with fails(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"):
        self.get(self.name, self.over_tcp)
    self.tokens.RevokeToken(self.token_proto.RevokeTokenRequest(id=created.token.id), timeout=HUNG)
    with fails(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"):
        self.get(self.name, self.over_tcp, bearer)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
