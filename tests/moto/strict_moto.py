"""moto's Secrets Manager, mended where it is more lenient than AWS, or wrong.

    python3 tests/moto/strict_moto.py [--port N]

prints `listening on http://127.0.0.1:PORT` once it answers; port 0, the default, is any free one. Where standard
input is a pipe or a socket, the server ends when that is closed: it does not outlive the tests that started it.

Each function below that replaces one of moto's names the page of the AWS Secrets Manager API reference that it
follows: https://docs.aws.amazon.com/secretsmanager/latest/apireference/<page>.html. Not simulated: access control,
throttling, eventual consistency, rotation by Lambda functions. STS answers at the same address, as moto has it: an
assumed role acts in the account that its ARN names.
"""

import argparse
import base64
import binascii
import functools
import json
import logging
import os
import re
import stat
import sys
import threading
import time

from moto.core.exceptions import JsonRESTError
from moto.secretsmanager import exceptions, models, responses
from moto.server import ThreadedMotoServer

NAME = re.compile(r"[A-Za-z0-9/_+=.@-]{1,512}")
MOST_BYTES = 65_536
MOST_IN_BATCH = 20
MOST_ON_PAGE = 100
MOST_LABELS = 20

# moto's server has a thread for each request and its models have no locks, but a label's move has to be atomic.
LOCK = threading.RLock()


class Refusal(JsonRESTError):
    """An error as AWS sends it: status 400 whatever the code."""

    code = 400


def not_found(what=""):
    """`what` is empty where the secret itself is missing. The wording of both is AWS's own; clients tell by it."""
    of = f" value for {what}" if what else "."
    return Refusal("ResourceNotFoundException", f"Secrets Manager can't find the specified secret{of}")


def invalid_parameter(message):
    return Refusal("InvalidParameterException", message)


def invalid_request(message):
    return Refusal("InvalidRequestException", message)


def violation(member, value, constraint):
    shown = f"Value '{value}'" if value is not None else "Value"
    problem = f"{shown} at '{member}' failed to satisfy constraint: Member must {constraint}"
    return Refusal("ValidationException", f"1 validation error detected: {problem}")


def now():
    """API_GetSecretValue: CreatedDate has milliseconds; moto has whole seconds."""
    return round(time.time(), 3)


# What a secret is: versions, and labels of which each is on one version.


def live(backend, secret_id):
    """The secret, if it is there and not deleted. API_DeleteSecret: a deleted one can't be read or written."""
    secret = described(backend, secret_id)
    if secret.is_deleted():
        raise invalid_request(
            "You can't perform this operation on the secret because it was marked for deletion."
        )
    return secret


def described(backend, secret_id):
    if not secret_id or secret_id not in backend.secrets:
        raise not_found()
    return backend.secrets[secret_id]


def holder(secret, stage):
    return next((id for id, version in secret.versions.items() if stage in version["version_stages"]), None)


def detach(secret, stage):
    for version in secret.versions.values():
        if stage in version["version_stages"]:
            version["version_stages"].remove(stage)


def attach(secret, stage, version_id):
    """API_PutSecretValue, VersionStages: a label is on one version. Who loses AWSCURRENT gets AWSPREVIOUS, and keeps
    its other labels, which moto drops."""
    last = holder(secret, stage)
    if last == version_id:
        return
    detach(secret, stage)
    if stage == "AWSCURRENT":
        detach(secret, "AWSPREVIOUS")
        if last is not None:
            secret.versions[last]["version_stages"].append("AWSPREVIOUS")
        # moto reads this where a request names neither label nor id, and forgets to move it with the label.
        secret.set_default_version_id(version_id)
    secret.versions[version_id]["version_stages"].append(stage)


def has_value(version):
    return "secret_string" in version or "secret_binary" in version


def add_version(secret, version_id, stages, text, binary):
    version = {"createdate": now(), "version_id": version_id, "version_stages": []}
    kept = secret.versions.get(version_id)
    if kept is not None:
        # Announced by RotateSecret: it has labels, but no value yet.
        version["version_stages"] = kept["version_stages"]
    if text is not None:
        version["secret_string"] = text
    if binary is not None:
        version["secret_binary"] = binary
    secret.versions[version_id] = version
    for stage in stages:
        attach(secret, stage, version_id)
    secret.last_changed_date = now()


def repeated(secret, token, text, binary):
    """API_PutSecretValue, ClientRequestToken: the same token with the same value changes nothing, with another value
    it fails; also while the version is AWSPENDING, where moto overwrites it."""
    version = secret.versions.get(token)
    if version is None or not has_value(version):
        return False
    if version.get("secret_string") == text and version.get("secret_binary") == binary:
        return True
    raise Refusal(
        "ResourceExistsException",
        f"You can't use ClientRequestToken {token} because that value is already in use for a version of "
        f"secret {secret.arn}.",
    )


# What a request may hold.


def check_name(name):
    """API_CreateSecret, Name."""
    if not name or not NAME.fullmatch(name):
        raise Refusal(
            "ValidationException",
            "Invalid name. Must be a valid name containing alphanumeric characters, or any of the following: -/_+=.@",
        )


def check_value(text, binary):
    """API_PutSecretValue, SecretString and SecretBinary: 1 to 65,536 bytes, one of them."""
    if text is not None and binary is not None:
        raise invalid_parameter("You can't specify both a binary secret value and a string secret value in the same secret.")
    if text is not None:
        size, member = len(text.encode()), "secretString"
    elif binary is not None:
        try:
            size, member = len(base64.b64decode(binary, validate=True)), "secretBinary"
        except (binascii.Error, ValueError):
            raise Refusal("SerializationException", "SecretBinary is not valid base64") from None
    else:
        return False
    if size < 1:
        raise violation(member, None, "have length greater than or equal to 1")
    if size > MOST_BYTES:
        raise violation(member, None, f"have length less than or equal to {MOST_BYTES}")
    return True


def check_stages(stages):
    """API_PutSecretValue, VersionStages: 1 to 20 items of 1 to 256 characters."""
    if not 1 <= len(stages) <= MOST_LABELS:
        raise violation("versionStages", stages, f"have length between 1 and {MOST_LABELS}")
    for stage in stages:
        if not 1 <= len(stage) <= 256:
            raise violation("versionStages", stages, "have length between 1 and 256")


def check_label_count(secret, version_id, stages):
    """reference_limits, "Staging labels across all versions of a secret"."""
    version = secret.versions.get(version_id)
    carried = set(version["version_stages"]) if version else set()
    if len(carried | set(stages)) > MOST_LABELS:
        raise Refusal("LimitExceededException", f"You can't attach more than {MOST_LABELS} staging labels.")


def page(items, size, token):
    """One page of a list, and where the next one starts. API_ListSecrets: a token that is none is an error."""
    size = size or MOST_ON_PAGE
    if not 1 <= size <= MOST_ON_PAGE:
        raise violation("maxResults", size, f"have value between 1 and {MOST_ON_PAGE}")
    if token is not None and not str(token).isdecimal():
        raise Refusal("InvalidNextTokenException", "The NextToken value is invalid.")
    start = int(token or 0)
    end = start + size
    return items[start:end], str(end) if end < len(items) else None


# What replaces moto's.


def get_secret_value(backend, secret_id, version_id, version_stage):
    """API_GetSecretValue. moto without a label answers with what was AWSCURRENT before the last move, and for an
    absent label as if the secret were absent."""
    secret = live(backend, secret_id)
    if version_id and version_id not in secret.versions:
        raise not_found(f"VersionId: {version_id}")
    if version_id and version_stage and version_stage not in secret.versions[version_id]["version_stages"]:
        raise invalid_request("You provided a VersionStage that is not associated to the provided VersionId.")
    stage = version_stage or "AWSCURRENT"
    found = version_id or holder(secret, stage)
    if found is None or not has_value(secret.versions[found]):
        raise not_found(f"VersionId: {version_id}" if version_id else f"staging label: {stage}")
    version = secret.versions[found]
    answer = {
        "ARN": secret.arn,
        "Name": secret.name,
        "VersionId": found,
        "VersionStages": list(version["version_stages"]),
        "CreatedDate": version["createdate"],
    }
    if "secret_string" in version:
        answer["SecretString"] = version["secret_string"]
    if "secret_binary" in version:
        answer["SecretBinary"] = version["secret_binary"]
    if not answer["VersionStages"]:
        del answer["VersionStages"]
    return answer


def batch_get_secret_value(backend, secret_id_list=None, filters=None, max_results=None, next_token=None):
    """API_BatchGetSecretValue: at most 20 ids; what fails for one secret is that secret's error, where moto fails the
    whole call for one without a value."""
    if bool(secret_id_list) == bool(filters):
        raise invalid_parameter("You must include Filters or SecretIdList, but not both.")
    if max_results and not filters:
        raise invalid_parameter("To use MaxResults, you must also use the Filters parameter.")
    if len(secret_id_list or []) > MOST_IN_BATCH:
        raise violation("secretIdList", None, f"have length less than or equal to {MOST_IN_BATCH}")
    if max_results and max_results > MOST_IN_BATCH:
        raise violation("maxResults", max_results, f"have value less than or equal to {MOST_IN_BATCH}")
    ids = secret_id_list or [
        secret.name
        for secret in backend.secrets.values()
        if not secret.is_deleted() and models._matches(secret, filters)
    ]
    ids, token = page(ids, max_results or MOST_IN_BATCH, next_token)
    values, errors = [], []
    for secret_id in ids:
        try:
            values.append(get_secret_value(backend, secret_id, None, None))
        except JsonRESTError as error:
            errors.append({"SecretId": secret_id, "ErrorCode": error.error_type, "Message": error.message})
    return values, errors, token


def create_secret(backend, create, name, secret_string, secret_binary, client_request_token, **rest):
    """API_CreateSecret: the name's grammar, the value's bounds, a deleted secret of the name, repeated tokens."""
    check_name(name)
    valued = check_value(secret_string, secret_binary)
    token = backend._from_client_request_token(client_request_token)
    if name in dict.keys(backend.secrets):
        secret = backend.secrets[name]
        if secret.is_deleted():
            raise invalid_request(
                "You can't create this secret because a secret with this name is already scheduled for deletion."
            )
        if valued and repeated(secret, token, secret_string, secret_binary):
            return secret.to_short_dict(version_id=token)
        raise Refusal("ResourceExistsException", f"The operation failed because the secret {name} already exists.")
    answer = create(
        backend,
        name=name,
        secret_string=secret_string,
        secret_binary=secret_binary,
        client_request_token=token,
        **rest,
    )
    secret = backend.secrets[name]
    secret.created_date = secret.last_changed_date = now()
    for version in secret.versions.values():
        version["createdate"] = secret.created_date
    return answer


def put_secret_value(backend, secret_id, secret_string, secret_binary, client_request_token, version_stages):
    """API_PutSecretValue: labels move, repeated tokens, deleted secrets. moto leaves two versions AWSCURRENT after a
    label's move, and writes to deleted secrets."""
    secret = live(backend, secret_id)
    if isinstance(secret, models.ReplicaSecret):
        raise exceptions.OperationNotPermittedOnReplica()
    if not check_value(secret_string, secret_binary):
        raise invalid_parameter("You must provide either SecretString or SecretBinary.")
    stages = list(version_stages or ["AWSCURRENT"])
    check_stages(stages)
    token = backend._from_client_request_token(client_request_token)
    if not repeated(secret, token, secret_string, secret_binary):
        if not secret.versions and "AWSCURRENT" not in stages:
            stages.append("AWSCURRENT")
        check_label_count(secret, token, stages)
        add_version(secret, token, stages, secret_string, secret_binary)
    return secret.to_short_dict(include_version_stages=True, version_id=token)


def update_secret(backend, secret_id, secret_string, secret_binary, client_request_token, kms_key_id, description):
    """API_UpdateSecret: a value makes a new AWSCURRENT version, as PutSecretValue does."""
    secret = live(backend, secret_id)
    valued = check_value(secret_string, secret_binary)
    secret.update(description or secret.description, secret.tags, kms_key_id, last_changed_date=now())
    if not valued:
        return secret.to_short_dict(include_version_id=False)
    token = backend._from_client_request_token(client_request_token)
    if not repeated(secret, token, secret_string, secret_binary):
        add_version(secret, token, ["AWSCURRENT"], secret_string, secret_binary)
    return secret.to_short_dict(version_id=token)


def update_secret_version_stage(backend, secret_id, version_stage, remove_from_version_id, move_to_version_id):
    """API_UpdateSecretVersionStage: where a label is on another version, RemoveFromVersionId has to name that one;
    where it does not, the operation fails. moto asks for it for AWSCURRENT alone."""
    secret = live(backend, secret_id)
    if not 1 <= len(version_stage or "") <= 256:
        raise violation("versionStage", version_stage, "have length between 1 and 256")
    for version_id in (remove_from_version_id, move_to_version_id):
        if version_id and version_id not in secret.versions:
            raise invalid_parameter(f"Not a valid version: {version_id}")
    attached = holder(secret, version_stage)
    if remove_from_version_id and remove_from_version_id != attached:
        raise invalid_parameter(
            f"The parameter RemoveFromVersionId doesn't match: staging label {version_stage} isn't attached to "
            f"version {remove_from_version_id}."
        )
    if not move_to_version_id:
        if not remove_from_version_id:
            raise invalid_parameter("You must specify RemoveFromVersionId or MoveToVersionId.")
        if version_stage == "AWSCURRENT":
            raise invalid_parameter(
                "You can only move staging label AWSCURRENT to a different secret version. It can't be completely removed."
            )
        detach(secret, version_stage)
    else:
        if attached and attached != move_to_version_id and not remove_from_version_id:
            raise invalid_parameter(
                f"The parameter RemoveFromVersionId can't be empty. Staging label {version_stage} is currently "
                f"attached to version {attached}, so you must explicitly reference that version in RemoveFromVersionId."
            )
        check_label_count(secret, move_to_version_id, [version_stage])
        attach(secret, version_stage, move_to_version_id)
    secret.last_changed_date = now()
    return secret.arn, secret.name


def describe_secret(backend, secret_id):
    return described(backend, secret_id)


def labelled_versions(secret):
    """API_DescribeSecret, VersionIdsToStages: versions without a label are not in it."""
    versions = secret.versions.items()
    return {id: list(version["version_stages"]) for id, version in versions if version["version_stages"]}


def list_secret_version_ids(response):
    """API_ListSecretVersionIds: only versions with a value, only labelled ones unless IncludeDeprecated, in pages; an
    unknown secret is a 400, where moto has a 500."""
    secret = described(response.backend, response._get_param("SecretId"))
    unlabelled = response._get_param("IncludeDeprecated", if_none=False)
    versions = [
        {"VersionId": id, "VersionStages": version["version_stages"], "CreatedDate": version["createdate"]}
        for id, version in secret.versions.items()
        if has_value(version) and (unlabelled or version["version_stages"])
    ]
    versions, token = page(versions, response._get_int_param("MaxResults"), response._get_param("NextToken"))
    answer = {"ARN": secret.arn, "Name": secret.name, "Versions": versions}
    return json.dumps(answer | ({"NextToken": token} if token else {}))


def list_secrets(response):
    """API_ListSecrets: SortBy, SortOrder, the bounds of MaxResults, tokens that are none."""
    filters = response._get_param("Filters", if_none=[])
    responses._validate_filters(filters)
    deleted = response._get_param("IncludePlannedDeletion", if_none=False)
    secrets = [
        secret
        for secret in response.backend.secrets.values()
        if (deleted or not secret.is_deleted()) and models._matches(secret, filters)
    ]
    if response._get_param("SortBy") == "name":
        secrets.sort(key=lambda secret: secret.name)
    if response._get_param("SortOrder") == "desc":
        secrets.reverse()
    secrets, token = page(secrets, response._get_int_param("MaxResults"), response._get_param("NextToken"))
    answer = {"SecretList": [secret.to_dict() for secret in secrets]}
    return json.dumps(answer | ({"NextToken": token} if token else {}))


def put_secret_value_request(response):
    """API_PutSecretValue: moto answers for a missing value and for an empty one before the model is asked."""
    stages = response._get_param("VersionStages")
    if stages is not None:
        check_stages(stages)
    return response.backend.put_secret_value(
        secret_id=response._get_param("SecretId"),
        secret_string=response._get_param("SecretString"),
        secret_binary=response._get_param("SecretBinary"),
        client_request_token=response._get_param("ClientRequestToken"),
        version_stages=stages,
    )


def reset_default_version(secret, version, version_id):
    """Where RotateSecret, which stays moto's, moves AWSCURRENT."""
    secret.versions[version_id] = version
    version["version_stages"] = [stage for stage in version["version_stages"] if stage != "AWSCURRENT"]
    attach(secret, "AWSCURRENT", version_id)


def with_status_400(initialise):
    """reference, "Common Errors": ResourceNotFoundException and its like are 400; moto has 404."""

    @functools.wraps(initialise)
    def mended(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        self.code = 400

    return mended


def one_at_a_time(function):
    @functools.wraps(function)
    def locked(*args, **kwargs):
        with LOCK:
            return function(*args, **kwargs)

    return locked


def mend():
    """Puts the functions above in the places of moto's."""
    backend, response = models.SecretsManagerBackend, responses.SecretsManagerResponse
    creation = functools.partialmethod(create_secret, backend.create_secret)
    for owner, name, function in (
        (backend, "get_secret_value", get_secret_value),
        (backend, "batch_get_secret_value", batch_get_secret_value),
        (backend, "put_secret_value", put_secret_value),
        (backend, "update_secret", update_secret),
        (backend, "update_secret_version_stage", update_secret_version_stage),
        (backend, "describe_secret", describe_secret),
        (backend, "delete_secret", backend.delete_secret),
        (backend, "restore_secret", backend.restore_secret),
        (backend, "rotate_secret", backend.rotate_secret),
        (models.FakeSecret, "_form_version_ids_to_stages", labelled_versions),
        (models.FakeSecret, "reset_default_version", reset_default_version),
        (response, "list_secret_version_ids", list_secret_version_ids),
        (response, "list_secrets", list_secrets),
        (response, "put_secret_value", put_secret_value_request),
    ):
        setattr(owner, name, one_at_a_time(function))
    backend.create_secret = creation
    response.create_secret = one_at_a_time(response.create_secret)
    for refusal in vars(exceptions).values():
        if isinstance(refusal, type) and issubclass(refusal, exceptions.SecretsManagerClientError):
            refusal.__init__ = with_status_400(refusal.__init__)


def end_with_standard_input():
    """Ends the process when the other end of standard input is closed, where it has one."""
    kind = os.fstat(0).st_mode
    if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
        return

    def watch():
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0, the default, is any free one")
    arguments = parser.parse_args()
    # One line for each request would bury what the tests say.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    end_with_standard_input()
    mend()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=arguments.port, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    print(f"listening on http://{host}:{port}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
