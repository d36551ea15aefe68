"""The strict launcher does what the AWS reference says. Run by tests/run."""

import pathlib
import subprocess
import sys
import unittest
import uuid

import boto3
import botocore.config
import botocore.exceptions

LAUNCHER = pathlib.Path(__file__).with_name("strict_moto.py")


def setUpModule():
    global server, client
    server = subprocess.Popen([sys.executable, LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    endpoint = server.stdout.readline().removeprefix("listening on ").strip()
    client = boto3.client(
        "secretsmanager",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        # The client's own checks would hide the server's.
        config=botocore.config.Config(parameter_validation=False, retries={"total_max_attempts": 1}),
    )


def tearDownModule():
    server.stdin.close()
    server.stdout.close()
    if server.wait(timeout=30) != 0:
        raise AssertionError("the launcher did not end by itself")


class StrictMoto(unittest.TestCase):
    def setUp(self):
        self.name = f"test/{uuid.uuid4()}"
        self.first = client.create_secret(Name=self.name, SecretString="one")["VersionId"]

    def put(self, value="two", token=None, **rest):
        token = token or str(uuid.uuid4())
        client.put_secret_value(SecretId=self.name, SecretString=value, ClientRequestToken=token, **rest)
        return token

    def get(self, **rest):
        return client.get_secret_value(SecretId=self.name, **rest)["SecretString"]

    def stages(self):
        return client.describe_secret(SecretId=self.name)["VersionIdsToStages"]

    def refused(self, code, call, **arguments):
        with self.assertRaises(botocore.exceptions.ClientError) as caught:
            call(**arguments)
        error = caught.exception.response
        self.assertEqual(error["Error"]["Code"], code)
        self.assertEqual(error["ResponseMetadata"]["HTTPStatusCode"], 400)
        return error["Error"]["Message"]

    def move(self, stage, to=None, remove_from=None):
        ends = {"MoveToVersionId": to, "RemoveFromVersionId": remove_from}
        given = {key: value for key, value in ends.items() if value}
        return client.update_secret_version_stage(SecretId=self.name, VersionStage=stage, **given)

    def test_a_moved_label_is_what_is_read(self):
        second = self.put()
        self.move("AWSCURRENT", to=self.first, remove_from=second)
        self.assertEqual(self.get(), "one")
        batch = client.batch_get_secret_value(SecretIdList=[self.name])
        self.assertEqual(batch["SecretValues"][0]["SecretString"], "one")
        self.assertEqual(self.stages(), {self.first: ["AWSCURRENT"], second: ["AWSPREVIOUS"]})

    def test_a_write_after_a_move_leaves_one_current_version(self):
        second = self.put()
        self.move("AWSCURRENT", to=self.first, remove_from=second)
        third = self.put("three")
        self.assertEqual(self.stages(), {third: ["AWSCURRENT"], self.first: ["AWSPREVIOUS"]})

    def test_labels_of_the_users_own_stay_when_awscurrent_moves(self):
        self.move("stable", to=self.first)
        self.put()
        self.assertEqual(sorted(self.stages()[self.first]), ["AWSPREVIOUS", "stable"])

    def test_a_token_names_one_value_also_while_pending(self):
        token = self.put(VersionStages=["AWSPENDING"])
        self.put(token=token, VersionStages=["AWSPENDING"])
        put = client.put_secret_value
        self.refused(
            "ResourceExistsException", put, SecretId=self.name, SecretString="other", ClientRequestToken=token
        )
        self.assertEqual(self.get(VersionStage="AWSPENDING"), "two")
        self.assertEqual(self.get(), "one")

    def test_awspending_moves_to_whoever_asks(self):
        self.put(VersionStages=["AWSPENDING"])
        thief = self.put("three", VersionStages=["AWSPENDING"])
        self.assertEqual(self.stages(), {self.first: ["AWSCURRENT"], thief: ["AWSPENDING"]})

    def test_a_label_moves_only_from_where_it_is(self):
        second = self.put()
        self.move("stable", to=self.first)
        for remove_from in (None, second):
            self.refused("InvalidParameterException", self.move, stage="stable", to=second, remove_from=remove_from)
        self.move("stable", to=second, remove_from=self.first)
        self.move("stable", to=second)
        self.assertEqual(self.get(VersionStage="stable"), "two")
        self.move("stable", remove_from=second)
        self.assertIn("label: stable", self.refused("ResourceNotFoundException", self.get, VersionStage="stable"))
        self.refused("InvalidParameterException", self.move, stage="AWSCURRENT", remove_from=second)

    def test_unlabelled_versions_are_listed_only_when_asked_for(self):
        second, third = self.put(), self.put("three")
        listed = client.list_secret_version_ids(SecretId=self.name)["Versions"]
        self.assertEqual({version["VersionId"] for version in listed}, {second, third})
        self.assertEqual(set(self.stages()), {second, third})
        every = client.list_secret_version_ids(SecretId=self.name, IncludeDeprecated=True, MaxResults=2)
        self.assertEqual(len(every["Versions"]), 2)
        rest = client.list_secret_version_ids(
            SecretId=self.name, IncludeDeprecated=True, NextToken=every["NextToken"]
        )
        self.assertEqual([version["VersionId"] for version in rest["Versions"]], [third])
        self.assertNotIn("NextToken", rest)
        self.refused("ResourceNotFoundException", client.list_secret_version_ids, SecretId="test/absent")

    def test_what_is_missing_is_said_as_aws_says_it(self):
        gone = self.refused("ResourceNotFoundException", client.get_secret_value, SecretId="test/absent")
        self.assertEqual(gone, "Secrets Manager can't find the specified secret.")
        version = self.refused("ResourceNotFoundException", self.get, VersionId=str(uuid.uuid4()))
        self.assertIn("secret value for VersionId", version)

    def test_a_batch_takes_twenty_and_fails_by_item(self):
        get = client.batch_get_secret_value
        self.refused("ValidationException", get, SecretIdList=[self.name] * 21)
        empty = f"test/{uuid.uuid4()}"
        client.create_secret(Name=empty)
        batch = get(SecretIdList=["test/absent", self.name, empty])
        self.assertEqual([value["Name"] for value in batch["SecretValues"]], [self.name])
        self.assertEqual([error["SecretId"] for error in batch["Errors"]], ["test/absent", empty])

    def test_values_and_names_have_bounds(self):
        put = client.put_secret_value
        self.put("x" * 65_536)
        for value in ({"SecretString": "x" * 65_537}, {"SecretBinary": b"x" * 65_537}, {"SecretString": ""}):
            self.refused("ValidationException", put, SecretId=self.name, **value)
        for value in ({}, {"SecretString": "x", "SecretBinary": b"x"}):
            self.refused("InvalidParameterException", put, SecretId=self.name, **value)
        for name in ("", "a b", "é", "x" * 513):
            self.refused("ValidationException", client.create_secret, Name=name, SecretString="x")

    def test_a_creation_can_be_repeated_but_not_changed(self):
        name, token = f"test/{uuid.uuid4()}", str(uuid.uuid4())
        for _ in range(2):
            client.create_secret(Name=name, SecretString="x", ClientRequestToken=token)
        for value, other in (("y", token), ("x", str(uuid.uuid4()))):
            create = client.create_secret
            self.refused("ResourceExistsException", create, Name=name, SecretString=value, ClientRequestToken=other)

    def test_a_deleted_secret_is_not_written(self):
        client.delete_secret(SecretId=self.name, RecoveryWindowInDays=7)
        for call, arguments in (
            (client.put_secret_value, {"SecretString": "x"}),
            (client.get_secret_value, {}),
            (client.update_secret_version_stage, {"VersionStage": "stable", "MoveToVersionId": self.first}),
            (client.delete_secret, {"RecoveryWindowInDays": 7}),
        ):
            self.refused("InvalidRequestException", call, SecretId=self.name, **arguments)
        self.refused("InvalidRequestException", client.create_secret, Name=self.name, SecretString="x")
        client.restore_secret(SecretId=self.name)
        self.assertEqual(self.get(), "one")

    def test_lists_are_sorted_and_paged(self):
        prefix = f"list-{uuid.uuid4()}"
        for name in "bca":
            client.create_secret(Name=f"{prefix}/{name}", SecretString="x")
        ask = {"Filters": [{"Key": "name", "Values": [prefix]}], "SortBy": "name", "MaxResults": 2}
        page = client.list_secrets(**ask)
        rest = client.list_secrets(**ask, NextToken=page["NextToken"])
        self.assertEqual([secret["Name"][-1] for secret in page["SecretList"] + rest["SecretList"]], ["a", "b", "c"])
        self.assertNotIn("NextToken", rest)
        self.refused("InvalidNextTokenException", client.list_secrets, NextToken="none")


if __name__ == "__main__":
    unittest.main()
