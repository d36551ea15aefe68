"""Looks at the files in deploy/ as the tools that read them would, and for what the house asks of them.

    python tests/deploy/check.py [REPOSITORY]

A line for each thing that was looked at; exit code 1 where one is wrong. The schemas (Compose, Kubernetes) come with the
packages of PyPI that tests/run installs, so nothing is fetched. systemd-analyze and kubectl are asked where they are
installed.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib

import dockerfile_parse
import kubernetes_validate
import yaml

OLDEST_KUBERNETES = "1.31"
# Tenths of what `systemd-analyze security` says: a service that nobody hardened has 96.
MOST_EXPOSURE = 20
USER = "65532"


class Wrong(Exception):
    """What is wrong, and where."""


def must(holds, problem):
    if not holds:
        raise Wrong(problem)


def run(*command):
    """What a command prints; where it fails, the end of that."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip()
    must(done.returncode == 0, f"{command[0]}: " + " / ".join(line.strip() for line in said.splitlines()[-8:]))
    return done.stdout, done.stderr


def pinned(image):
    """Whether an image is named with a tag that says which, or by its digest."""
    name, _, tag = image.rpartition(":")
    return "@sha256:" in image or bool(name and "/" not in tag and tag not in ("", "latest"))


def has(text, line):
    """Whether a unit has exactly this line."""
    return line in text.splitlines()


class Repository:
    def __init__(self, top):
        self.top = top
        self.deploy = top / "deploy"

    def text(self, path):
        return (self.deploy / path).read_text(encoding="utf-8")

    def dockerfile(self):
        with tempfile.TemporaryDirectory() as folder:
            parser = dockerfile_parse.DockerfileParser(path=folder)
            parser.content = self.text("Dockerfile")
            structure = [step for step in parser.structure if step["instruction"] != "COMMENT"]
        stages = [step["value"] for step in structure if step["instruction"] == "FROM"]
        for stage in stages:
            must(pinned(stage.split(" ")[0]), f"FROM {stage}: say which version")
        last = structure[max(n for n, step in enumerate(structure) if step["instruction"] == "FROM"):]
        users = [step["value"] for step in last if step["instruction"] == "USER"]
        must(users and re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]), f"USER {users}: a number that is not root's")
        for step in structure:
            must(step["instruction"] != "ADD", f"ADD {step['value']}: COPY what is in the repository, and nothing else")
        for name in ("ENTRYPOINT", "CMD"):
            values = [step["value"] for step in last if step["instruction"] == name]
            must(len(values) == 1 and isinstance(json.loads(values[0]), list), f"{name}: one, without a shell")
        must(any(step["instruction"] == "HEALTHCHECK" for step in last), "HEALTHCHECK: say which, or NONE")
        self.context([step["value"] for step in structure if step["instruction"] == "COPY"])
        rust = re.search(r'^rust-version = "(\d+)\.(\d+)', (self.top / "Cargo.toml").read_text(), re.MULTILINE)
        image = re.match(r"rust:(\d+)\.(\d+)", stages[0])
        must(image and tuple(map(int, image.groups())) >= tuple(map(int, rust.groups())), f"{stages[0]}: too old")

    def context(self, copies):
        """What is copied from the repository is there, and .dockerignore lets it through."""
        let_through = [line[1:] for line in (self.top / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
        for words in (copy.split() for copy in copies if "--from=" not in copy):
            for source in words[:-1]:
                must((self.top / source).exists(), f"COPY {source}: does not exist")
                must(source in let_through, f"COPY {source}: .dockerignore keeps it out")

    def compose(self):
        path = self.deploy / "compose.yaml"
        run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", path)
        document = yaml.safe_load(path.read_text())
        for name, service in document["services"].items():
            must(pinned(service["image"]), f"{name}: image {service['image']}: say which version")
            must(not service["user"].startswith("0"), f"{name}: runs as root")
            must(service["read_only"] is True, f"{name}: its file system can be written to")
            must(service["cap_drop"] == ["ALL"], f"{name}: keeps capabilities")
            must("no-new-privileges:true" in service["security_opt"], f"{name}: may gain privileges")
            must("privileged" not in service and "cap_add" not in service, f"{name}: asks for privileges")
            mounts = [volume.split(":")[0] for volume in service.get("volumes", [])]
            for mount in mounts:
                known = mount in document["volumes"] or (self.deploy / mount).is_file()
                must(known, f"{name}: volume {mount} is not there")
        must(document["services"]["claviger"]["user"].startswith(USER), "claviger: another user than the image's")

    def kubernetes(self):
        folder = self.deploy / "kubernetes"
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
        found = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
        must(found == set(kustomization["resources"]), f"kustomization.yaml: lists {kustomization['resources']}")
        resources = [yaml.safe_load((folder / name).read_text()) for name in sorted(found)]
        self.validate(resources)
        by_kind = {resource["kind"]: resource for resource in resources}
        for resource in resources:
            at_home = resource["kind"] == "Namespace" or resource["metadata"]["namespace"] == kustomization["namespace"]
            must(at_home, f"{resource['kind']}: in another namespace")
        self.pod(by_kind["Deployment"]["spec"], folder)
        self.selectors(by_kind)
        self.rotation_job(by_kind["CronJob"]["spec"], by_kind["Service"], by_kind["NetworkPolicy"])
        if shutil.which("kubectl"):
            self.validate([part for part in yaml.safe_load_all(run("kubectl", "kustomize", folder)[0]) if part])

    @staticmethod
    def validate(resources):
        for resource in resources:
            for version in (OLDEST_KUBERNETES, kubernetes_validate.latest_version()):
                try:
                    kubernetes_validate.validate(resource, version, strict=True)
                except kubernetes_validate.ValidationError as error:
                    raise Wrong(f"{resource['kind']} in {version}: {error.message}") from error

    @staticmethod
    def restricted(pod):
        """The Pod Security Standard `restricted`, and nothing that can be written to but volumes. Gives the container."""
        user = pod["securityContext"]
        must(user["runAsNonRoot"] is True and str(user["runAsUser"]) == USER, "the pod: may run as root")
        must(user["seccompProfile"] == {"type": "RuntimeDefault"}, "the pod: every system call is open")
        must(pod["automountServiceAccountToken"] is False, "the pod: holds a token that it does not need")
        (container,) = pod["containers"]
        context = container["securityContext"]
        must(context["readOnlyRootFilesystem"] is True, "the container: its file system can be written to")
        must(context["allowPrivilegeEscalation"] is False, "the container: may gain privileges")
        must(context["capabilities"] == {"drop": ["ALL"]}, "the container: keeps capabilities")
        must(pinned(container["image"]), f"image {container['image']}: say which version")
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        must(mounted == {volume["name"] for volume in pod["volumes"]}, "volumes and mounts differ")
        return container

    def pod(self, deployment, folder):
        """What the broker itself needs."""
        must(deployment["replicas"] == 1 and deployment["strategy"] == {"type": "Recreate"}, "two brokers on one store")
        pod = deployment["template"]["spec"]
        container = self.restricted(pod)
        policy = pod["securityContext"]["fsGroupChangePolicy"]
        must(policy == "OnRootMismatch", "the pod: each mount would open the state to the group")
        must(pod["terminationGracePeriodSeconds"] >= 20, "the pod: is killed before it has drained")
        ports = {port["name"] for port in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            get = container[probe]["httpGet"]
            must(get["port"] in ports and get["path"] in ("/livez", "/readyz"), f"{probe}: asks what is not there")
        must(container["livenessProbe"]["httpGet"]["path"] == "/livez", "livenessProbe: kills a broker that only waits")
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        must(container["args"][-1] == f"{mounts['config']}/claviger.toml", "the configuration is mounted elsewhere")
        text = (folder / "claviger.toml").read_text()
        for name in ("state", "tls", "run"):
            must(f'"{mounts[name]}/' in text, f"claviger.toml: does not use {mounts[name]}")
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        credentials = environment["CREDENTIALS_DIRECTORY"]
        must(credentials == f"{mounts['credentials']}/..data", "CREDENTIALS_DIRECTORY: leads to links")

    @staticmethod
    def selectors(by_kind):
        labels = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"]
        for kind, selector in (
            ("Deployment", by_kind["Deployment"]["spec"]["selector"]["matchLabels"]),
            ("Service", by_kind["Service"]["spec"]["selector"]),
            ("PodDisruptionBudget", by_kind["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]),
            ("NetworkPolicy", by_kind["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]),
        ):
            must(selector.items() <= labels.items(), f"{kind}: selects other pods")
        (container,) = by_kind["Deployment"]["spec"]["template"]["spec"]["containers"]
        ports = {port["name"] for port in container["ports"]}
        used = {port["targetPort"] for port in by_kind["Service"]["spec"]["ports"]}
        used |= {port["port"] for rule in by_kind["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]}
        must(used <= ports, f"ports {sorted(used - ports)} are not the container's")
        must(set(by_kind["NetworkPolicy"]["spec"]["policyTypes"]) == {"Ingress", "Egress"}, "NetworkPolicy: half of one")

    def rotation_job(self, cron, service, network_policy):
        """That it goes on after whatever happened, and reaches the broker with nothing but its own token."""
        every = re.fullmatch(r"\*/(\d+) \* \* \* \*", cron["schedule"])
        must(every, f"CronJob: schedule {cron['schedule']}: not every so many minutes")
        every = int(every[1]) * 60
        safe = cron["concurrencyPolicy"] in ("Forbid", "Allow")
        must(safe, f"CronJob: concurrencyPolicy {cron['concurrencyPolicy']}: a start ends the one before it")
        # The controller looks every ten seconds, and gives up where it counts more than a hundred missed starts.
        deadline = cron["startingDeadlineSeconds"]
        must(10 < deadline <= 100 * every, f"CronJob: startingDeadlineSeconds {deadline}: it may never start again")
        job = cron["jobTemplate"]["spec"]
        must(job["activeDeadlineSeconds"] <= every, "CronJob: a Job that hangs keeps the next ones from starting")
        must(job["backoffLimit"] <= 6, "CronJob: a Job that fails is tried over and over")
        labels = job["template"]["metadata"]["labels"]
        must(not service["spec"]["selector"].items() <= labels.items(), "CronJob: the Service sends calls to its pods")
        peers = [peer for rule in network_policy["spec"]["ingress"] for peer in rule["from"] if "podSelector" in peer]
        lets_in = any(peer["podSelector"]["matchLabels"].items() <= labels.items() for peer in peers)
        must(lets_in, "CronJob: the NetworkPolicy keeps its pods out")
        pod = job["template"]["spec"]
        must(pod["restartPolicy"] == "Never", "CronJob: what podFailurePolicy needs")
        container = self.restricted(pod)
        must(container["args"][:2] == ["rotate", "--due"], f"CronJob: runs {container['args']}")
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
        addresses = [f"https://{name}.{namespace}.svc:{port['port']}" for port in service["spec"]["ports"]]
        must(environment["CLAVIGER_ADDR"] == addresses[0], "CronJob: CLAVIGER_ADDR is not the Service's")
        self.files_of_job(pod, container, [container["args"][3], environment["CLAVIGER_CA_FILE"]])

    @staticmethod
    def files_of_job(pod, container, used):
        """Each file that it uses is mounted, and of the broker's key pair only the authority."""
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        folders = {f"{mount['mountPath']}/" for mount in mounts.values()}
        for path in used:
            must(any(path.startswith(folder) for folder in folders), f"CronJob: {path} is not mounted")
        for volume in pod["volumes"]:
            must(mounts[volume["name"]]["readOnly"] is True, f"CronJob: {volume['name']} can be written to")
            items = [item["key"] for item in volume["secret"].get("items", [])]
            shared = volume["secret"]["secretName"] != "claviger-rotate-token"
            must(not shared or items == ["ca.crt"], f"CronJob: gets more of volume {volume['name']} than ca.crt")
            must(shared or volume["secret"]["defaultMode"] == 0o400, "CronJob: others may read the token")

    def systemd(self):
        broker, rotate, timer = map(self.text, ("claviger.service", "claviger-rotate.service", "claviger-rotate.timer"))
        must(has(broker, "LimitCORE=0"), "a core dump would hold what is in memory")
        must(re.search(r"^LoadCredential\w*=claviger-root-key:", broker, re.MULTILINE), "the root key is not handed over")
        must(not re.search(r"^PrivateUsers=(yes|true|on|1)", broker, re.MULTILINE), "every caller would be `nobody`")
        must(has(rotate, "Type=oneshot"), "claviger-rotate.service: a timer starts what ends by itself")
        runs = re.search(r"^ExecStart=\S+/claviger rotate --due$", rotate, re.MULTILINE)
        must(runs, "claviger-rotate.service: runs something else")
        must(not re.search(r"^PrivateUsers=(yes|true|on|1)", rotate, re.MULTILINE), "the broker would be `nobody`")
        users = re.findall(r"^User=(.*)$", rotate, re.MULTILINE)
        must(users == ["claviger-cron"], f"claviger-rotate.service: runs as {users}, who may do more than ask")
        must(re.search(r"^TimeoutStartSec=\d", rotate, re.MULTILINE), "claviger-rotate.service: may hang for good")
        must(has(timer, "Persistent=true"), "claviger-rotate.timer: forgets what it missed while the machine was off")
        must(re.search(r"^RandomizedDelaySec=\d", timer, re.MULTILINE), "claviger-rotate.timer: all at once")
        must(has(timer, "Unit=claviger-rotate.service"), "claviger-rotate.timer: starts another")
        must(has(timer, "WantedBy=timers.target"), "claviger-rotate.timer: can't be enabled")
        if not shutil.which("systemd-analyze"):
            return "systemd-analyze is not installed"
        with tempfile.TemporaryDirectory() as folder:
            units = [pathlib.Path(folder) / name for name in ("claviger.service", "claviger-rotate.service")]
            # It looks for the programs too, and the broker need not be installed where this runs.
            for unit, text in zip(units, (broker, rotate), strict=True):
                unit.write_text(text.replace("/usr/local/bin/claviger", "/bin/true"))
            timers = [pathlib.Path(folder) / "claviger-rotate.timer"]
            timers[0].write_text(timer)
            for unit in units + timers:
                # A key that it does not know is a remark to it, not an error.
                remarks = run("systemd-analyze", "verify", "--man=no", unit)[1].strip()
                must(not remarks, remarks)
            for unit in units:
                run("systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSURE}", unit)
        return None

    def rotations(self):
        """The examples of a definition. That the broker takes them is for its own tests to say."""
        files = sorted((self.deploy / "rotations").glob("*.toml"))
        must(files, "deploy/rotations: has no example")
        for path in files:
            definition = tomllib.loads(path.read_text(encoding="utf-8"))
            tables = [key for key, value in definition.items() if isinstance(value, dict)]
            must(tables == [definition["rotator"]], f"{path.name}: its settings are in {tables}")
            must(isinstance(definition["schedule"], str), f"{path.name}: schedule is not a text")
            must(definition[tables[0]].get("tls", "verify-full") == "verify-full", f"{path.name}: in the clear")
            said = f"--file deploy/rotations/{path.name}"
            must(said in path.read_text(encoding="utf-8"), f"{path.name}: does not say how it is set")


def main():
    top = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parents[2]).resolve()
    repository = Repository(top)
    failed = False
    for check in (repository.dockerfile, repository.compose, repository.kubernetes, repository.systemd, repository.rotations):
        try:
            left_out = check()
            print(f"ok       {check.__name__}" + (f" in part: {left_out}" if left_out else ""))
        except Wrong as wrong:
            failed = True
            print(f"wrong    {check.__name__}: {wrong}")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            failed = True
            print(f"wrong    {check.__name__}: not of the shape that is looked for: {error!r}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
