//! What lies in `deploy/`: each configuration is started as it is, but for where things are, and answers a read; the
//! rest is looked at by `tests/deploy/check.py`.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use claviger::rotation::Trouble;
use claviger::rotation::definition::Definition;
use claviger::rotation::rotators::ENTRIES;
use rustix::process::{Signal, getuid};

use crate::support::certificates::{Authority, Issued, Leaf};
use crate::support::moto::{Moto, REGION};
use crate::support::program::{Program, claviger, http_get};

/// How long anything may take before a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(60);

const AWS_CREDENTIALS: &[(&str, &str)] = &[
    ("AWS_ACCESS_KEY_ID", "test"),
    ("AWS_SECRET_ACCESS_KEY", "test"),
    ("AWS_EC2_METADATA_DISABLED", "true"),
];

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(repository(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn write(path: &Path, content: impl AsRef<[u8]>, mode: u32) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn folder(path: &Path, mode: u32) {
    fs::create_dir_all(path).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A machine as the examples think of one, below a folder of its own.
struct Machine {
    place: tempfile::TempDir,
    authority: Authority,
    variables: Vec<(&'static str, String)>,
}

impl Machine {
    /// With policies, and empty folders for state and sockets.
    fn new(mode_of_state: u32) -> Self {
        let place = tempfile::tempdir().unwrap();
        let policies = place.path().join("etc/policies");
        folder(&policies, 0o755);
        for (file, text) in claviger::policy::SHIPPED {
            write(&policies.join(file), text, 0o644);
        }
        folder(&place.path().join("run"), 0o755);
        folder(&place.path().join("state"), mode_of_state);
        Self { place, authority: Authority::new("test"), variables: Vec::new() }
    }

    fn path(&self, below: &str) -> PathBuf {
        self.place.path().join(below)
    }

    /// An example with this machine's places in it, with addresses that are free, and with `uid` for the test's own.
    fn configured(&self, example: &str, uid: u32) -> PathBuf {
        let place = |below: &str| self.path(below).display().to_string();
        let text = read(example)
            .replace("/run/claviger", &place("run"))
            .replace("/var/lib/claviger", &place("state"))
            .replace("/etc/claviger", &place("etc"))
            .replace("0.0.0.0:", "127.0.0.1:")
            .replace("127.0.0.1:7443", "127.0.0.1:0")
            .replace("127.0.0.1:7341", "127.0.0.1:0")
            .replace(&format!("uid = {uid}\n"), &format!("uid = {}\n", getuid().as_raw()));
        let path = self.path("claviger.toml");
        write(&path, text, 0o644);
        path
    }

    /// The same, with AWS at this endpoint.
    fn configured_for(&self, example: &str, uid: u32, aws: &Moto) -> PathBuf {
        let path = self.configured(example, uid);
        let region = format!("region = \"{REGION}\"");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(&region), "{example}");
        write(&path, text.replace(&region, &format!("{region}\nendpoint = \"{}\"", aws.endpoint())), 0o644);
        path
    }

    /// Looks at the configuration as its user would, and starts it.
    fn start(&mut self, config: &Path) -> Program {
        self.variables.extend(AWS_CREDENTIALS.iter().map(|(name, value)| (*name, (*value).to_owned())));
        let variables: Vec<_> = self.variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let mut check =
            claviger(["serve".as_ref(), "--check".as_ref(), "--config".as_ref(), config.as_os_str()]);
        let checked = check.envs(variables.iter().copied()).output().unwrap();
        assert!(checked.status.success(), "{}", said(&checked));
        let program = Program::serve(config, &self.path("run/claviger.sock"), &variables);
        program.wait_for_log("probes and metrics on ");
        program
    }

    /// Writes a pair for the broker, and the authority of its clients.
    fn write_certificates(&self, folder: &Path) {
        let Issued { certificate, key } = self.authority.server();
        write(&folder.join("tls.crt"), certificate, 0o644);
        write(&folder.join("tls.key"), key, mounted_mode());
        write(&folder.join("ca.crt"), self.authority.pem(), 0o644);
    }

    /// A read over TLS, by who holds this certificate.
    fn read_as(&self, client: &Issued, program: &Program, environment: &str, name: &str) -> Output {
        let (certificate, key, ca) =
            (self.path("client.crt"), self.path("client.key"), self.path("authority.crt"));
        write(&certificate, &client.certificate, 0o600);
        write(&key, &client.key, 0o600);
        write(&ca, self.authority.pem(), 0o644);
        let address = format!("https://localhost:{}", port(&program.log(), "listening on https://"));
        let mut command = claviger(["get", "-e", environment, "-a", &address, name]);
        command.arg("--ca-file").arg(ca).arg("--client-cert").arg(certificate).arg("--client-key").arg(key);
        command.output().unwrap()
    }
}

/// As Kubernetes and systemd hand a key to a service: root's own, and readable by one group.
fn mounted_mode() -> u32 {
    if getuid().is_root() { 0o440 } else { 0o400 }
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn port<'a>(log: &'a str, before: &str) -> &'a str {
    let line = log.lines().find_map(|line| line.split_once(before)).expect("it is in the log").1;
    line.trim().rsplit(':').next().unwrap()
}

fn key() -> String {
    format!("{}\n", "0123456789abcdef".repeat(4))
}

/// It takes calls, says so, and ends in good order.
async fn is_ready_and_ends(mut program: Program) {
    let admin = format!("http://127.0.0.1:{}", port(&program.log(), "probes and metrics on "));
    assert_eq!(http_get(&admin, "/livez").await.0, 200);
    let ready = async { while http_get(&admin, "/readyz").await.0 != 200 {} };
    tokio::time::timeout(HUNG, ready).await.expect("it is ready");
    assert!(program.signal(Signal::TERM).success(), "{}", program.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_for_one_machine_serves() {
    let mut machine = Machine::new(0o700);
    // As LoadCredential= of the unit, and the secrets of Compose, put it.
    folder(&machine.path("credentials"), 0o700);
    write(&machine.path("credentials/claviger-root-key"), key(), mounted_mode());
    machine.variables.push(("CREDENTIALS_DIRECTORY", machine.path("credentials").display().to_string()));
    let config = machine.configured("deploy/one-machine.toml", 0);
    let program = machine.start(&config);
    for name in ["database", "payments/key"] {
        let put = program.put("production", name, b"hunter2");
        assert!(put.status.success(), "{}", said(&put));
        let sources = [(); 2].map(|()| {
            let answer = program.ok(["get", "-e", "production", name, "--output", "json"]);
            let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
            assert_eq!(answer["value"], "hunter2");
            answer["source"].as_str().unwrap().to_owned()
        });
        let second = if name == "database" { "cache" } else { "store" };
        assert_eq!(sources, ["store", second], "{name}");
    }
    is_ready_and_ends(program).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_for_aws_serves() {
    let aws = Moto::start().await;
    let mut machine = Machine::new(0o700);
    folder(&machine.path("etc/tls"), 0o755);
    machine.write_certificates(&machine.path("etc/tls"));
    write(&machine.path("etc/root.key"), key(), 0o600);
    let config = machine.configured_for("deploy/aws.toml", 0, aws);
    let program = machine.start(&config);
    let name = format!("deploy-{}", uuid::Uuid::new_v4());
    for environment in ["staging", "production"] {
        let put = program.put(environment, &name, b"hunter2");
        assert!(put.status.success(), "{}", said(&put));
        assert_eq!(program.ok(["get", "-e", environment, &name]), "hunter2");
    }
    let ci = machine.authority.client(&Leaf { dns: &["ci.example.org"], ..Leaf::default() });
    let found = machine.read_as(&ci, &program, "staging", &name);
    assert_eq!(found.stdout, b"hunter2", "{}", said(&found));
    // Whoever it is: this machine is not in 10.0.0.0/8.
    let orders = machine.authority.spiffe("spiffe://example.org/ns/shop/sa/orders");
    let refused = machine.read_as(&orders, &program, "production", &name);
    assert_eq!(refused.status.code(), Some(3), "{}", said(&refused));
    assert!(said(&refused).contains("source_addresses"), "{}", said(&refused));
    is_ready_and_ends(program).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_for_a_sidecar_serves() {
    let aws = Moto::start().await;
    let name = format!("deploy-{}", uuid::Uuid::new_v4());
    let create = aws.client().create_secret().name(format!("production/{name}")).secret_string("hunter2");
    create.send().await.unwrap();
    // A volume of Kubernetes is its group's, and the folders below it inherit that.
    let mut machine = Machine::new(0o2775);
    let config = machine.configured_for("deploy/sidecar.toml", 65_532, aws);
    let program = machine.start(&config);
    assert_eq!(program.ok(["get", "-e", "production", &name]), "hunter2");
    program.fails(3, ["list", "-e", "production"]);
    assert!(machine.path("state/root.key").is_file(), "made at the first start");
    is_ready_and_ends(program).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configuration_for_kubernetes_serves_with_what_kubernetes_mounts() {
    let mut machine = Machine::new(0o2775);
    let credentials = mounted(&machine.path("etc/credentials"), |folder| {
        write(&folder.join("claviger-root-key"), key(), mounted_mode());
    });
    mounted(&machine.path("etc/tls"), |folder| machine.write_certificates(folder));
    machine.variables.push(("CREDENTIALS_DIRECTORY", credentials.display().to_string()));
    let config = machine.configured("deploy/kubernetes/claviger.toml", 65_532);
    let program = machine.start(&config);
    let put = program.put("production", "database", b"hunter2");
    assert!(put.status.success(), "{}", said(&put));
    let orders = machine.authority.spiffe("spiffe://cluster.local/ns/shop/sa/orders");
    let found = machine.read_as(&orders, &program, "production", "database");
    assert_eq!(found.stdout, b"hunter2", "{}", said(&found));
    is_ready_and_ends(program).await;
}

/// Lays files out as a Secret's volume has them, and gives the folder that holds the files themselves:
///
/// ```text
/// ..2026/NAME   ..data ─▶ ..2026   NAME ─▶ ..data/NAME
/// ```
fn mounted(place: &Path, fill: impl FnOnce(&Path)) -> PathBuf {
    let files = place.join("..2026");
    folder(&files, 0o755);
    fill(&files);
    let data = place.join("..data");
    symlink("..2026", &data).unwrap();
    for file in fs::read_dir(&files).unwrap() {
        let name = file.unwrap().file_name();
        symlink(Path::new("..data").join(&name), place.join(&name)).unwrap();
    }
    data
}

#[test]
fn every_key_of_the_configuration_is_in_an_example() {
    let examples =
        ["one-machine", "aws", "sidecar"].map(|name| read(&format!("deploy/{name}.toml"))).join("\n");
    let mut keys = Vec::new();
    for structure in
        ["Raw", "Listen", "Rates", "Kv", "RootKey", "Policy", "Audit", "Identity", "Cache", "Rotation"]
    {
        keys.extend(fields("src/config/raw.rs", structure));
    }
    for (file, structure) in [
        ("src/server/tls/mod.rs", "Config"),
        ("src/identity/mtls.rs", "Config"),
        ("src/identity/mtls.rs", "Caller"),
        ("src/identity/peer_credentials.rs", "Config"),
        ("src/identity/peer_credentials.rs", "Caller"),
        ("src/environment.rs", "Config"),
        ("src/environment.rs", "AwsSettings"),
    ] {
        keys.extend(fields(file, structure));
    }
    assert!(keys.len() > 50, "{keys:?}");
    let missing: Vec<_> = keys.iter().filter(|key| !shows(&examples, key)).collect();
    assert!(missing.is_empty(), "{missing:?} of the configuration are in no example");
}

/// The names of a structure's fields, as its source has them.
fn fields(file: &str, structure: &str) -> Vec<String> {
    let source = read(file);
    let (_, body) = source.split_once(&format!("struct {structure} {{")).expect(file);
    let (body, _) = body.split_once("\n}").expect(file);
    let lines = body.lines().map(str::trim).filter(|line| line.starts_with("pub"));
    let names = lines.filter_map(|line| line.split_once(':')?.0.rsplit(' ').next());
    names.map(str::to_owned).collect()
}

/// Whether an example has the key, or a table of that name; behind a `#` counts.
fn shows(examples: &str, key: &str) -> bool {
    examples.lines().any(|line| {
        let line = line.trim_start_matches(['#', ' ']);
        match line.strip_prefix('[') {
            Some(table) => table.trim_matches(['[', ']', ' ']).split('.').any(|part| part == key),
            None => line.split_once('=').is_some_and(|(name, _)| name.trim() == key),
        }
    })
}

#[test]
fn every_definition_of_a_rotation_is_taken() {
    let mut kinds = Vec::new();
    for file in fs::read_dir(repository("deploy/rotations")).unwrap() {
        let path = file.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let definition =
            Definition::parse(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        kinds.push(definition.rotator);
    }
    kinds.sort();
    // Each kind has an example.
    let mut known: Vec<_> = ENTRIES.iter().map(|entry| entry.kind).collect();
    known.sort_unstable();
    assert_eq!(kinds, known);
}

#[test]
fn every_key_of_a_rotation_is_in_an_example() {
    const KEYS_OF: [&str; 5] = [
        "definition",
        "rotators/postgresql/settings",
        "rotators/password",
        "rotators/random",
        "rotators/jwt_secret",
    ];
    let examples =
        ["database", "api-key", "jwt"].map(|name| read(&format!("deploy/rotations/{name}.toml"))).join("\n");
    let keys: Vec<_> =
        KEYS_OF.iter().flat_map(|file| listed(&format!("src/rotation/{file}.rs"), "KEYS")).collect();
    assert!(keys.len() > 25, "{keys:?}");
    let missing: Vec<_> = keys.iter().filter(|key| !shows(&examples, key)).collect();
    assert!(missing.is_empty(), "{missing:?} of a rotation are in no example");
}

/// The texts of a constant list, as its source has them.
fn listed(file: &str, constant: &str) -> Vec<String> {
    let source = read(file);
    let (_, declared) = source.split_once(&format!("const {constant}: ")).expect(file);
    let (list, _) = declared.split_once(" = ").and_then(|(_, list)| list.split_once("];")).expect(file);
    list.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// What is behind a `#` in an example is taken, too, where somebody removes that.
#[test]
fn every_key_that_an_example_leaves_out_is_taken() {
    let text = read("deploy/rotations/database.toml");
    let names: Vec<String> = ["src/rotation/definition.rs", "src/rotation/rotators/postgresql/settings.rs"]
        .iter()
        .flat_map(|file| listed(file, "KEYS"))
        .collect();
    let is_key = |line: &str| {
        let name = line.strip_prefix("# ").and_then(|line| line.split_once(" = ")).map(|(name, _)| name);
        name.is_some_and(|name| names.iter().any(|known| known == name))
    };
    let hidden: Vec<_> = text.lines().filter(|line| is_key(line)).collect();
    assert!(hidden.len() >= 7, "{hidden:?}");
    let shown = hidden.iter().fold(text.clone(), |text, line| text.replace(line, &line[2..]));
    let definition = Definition::parse(&shown).unwrap_or_else(|error| panic!("{error} in\n{shown}"));
    assert!(definition.repair && definition.group.is_some() && definition.retire_after.is_some());
}

/// The codes, and what a person should do, are those that the program tells.
#[test]
fn every_trouble_of_a_rotation_is_in_the_readme() {
    let readme = read("README.md");
    let (_, section) = readme.split_once("\n## Rotation\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let plain = |text: &str| text.replace('`', "");
    for trouble in Trouble::ALL {
        let (code, mend) = (trouble.code(), trouble.mend());
        assert!(section.contains(&format!("`{code}`")), "{code} is not in README.md");
        let row = section.lines().find(|line| line.starts_with(&format!("| `{code}` |"))).map(plain);
        let expected = trouble.needs_a_person().then(|| plain(&format!("| {code} | {mend} |")));
        assert_eq!(row, expected, "{code}");
    }
}

/// Runs `tests/deploy/check.py` on a repository.
fn checked(top: &Path) -> Output {
    let made = repository("target/test-venv");
    let python = std::env::var_os("CLAVIGER_TEST_PYTHON").map_or_else(
        || std::env::var_os("CLAVIGER_TEST_VENV").map_or(made, PathBuf::from).join("bin/python"),
        PathBuf::from,
    );
    let mut command = Command::new(&python);
    command.arg(repository("tests/deploy/check.py")).arg(top);
    command
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}; run `bash tests/run` first", python.display()))
}

#[test]
fn images_units_and_manifests_are_valid_and_hardened() {
    let output = checked(&repository(""));
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(said(&output).lines().filter(|line| line.starts_with("ok ")).count(), 5, "{}", said(&output));
}

#[test]
fn what_is_wrong_with_them_is_found() {
    let top = tempfile::tempdir().unwrap();
    for part in ["Cargo.toml", "Cargo.lock", ".dockerignore"] {
        fs::copy(repository(part), top.path().join(part)).unwrap();
    }
    for part in ["benches", "policies", "src", "tests", "deploy/kubernetes", "deploy/rotations"] {
        fs::create_dir_all(top.path().join(part)).unwrap();
    }
    for part in ["deploy", "deploy/kubernetes", "deploy/rotations"] {
        let files = fs::read_dir(repository(part)).unwrap().map(Result::unwrap);
        for file in files.filter(|file| file.file_type().unwrap().is_file()) {
            fs::copy(file.path(), top.path().join(part).join(file.file_name())).unwrap();
        }
    }
    let output = checked(top.path());
    assert!(output.status.success(), "{}", said(&output));
    let faults = [
        ("deploy/Dockerfile", "USER 65532:65532", "USER root", "dockerfile"),
        ("deploy/compose.yaml", "read_only:", "readonly:", "compose"),
        ("deploy/kubernetes/deployment.yaml", "drop: [ALL]", "drop: [NET_RAW]", "kubernetes"),
        ("deploy/claviger.service", "LimitCORE=0", "LimitCORE=infinity", "systemd"),
        ("deploy/rotations/jwt.toml", "[jwt-secret]", "[jwt]", "rotations"),
    ];
    for (file, from, to, _) in faults {
        let path = top.path().join(file);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{file}");
        fs::write(path, text.replace(from, to)).unwrap();
    }
    let output = checked(top.path());
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    for (file, .., check) in faults {
        let found = said(&output).lines().any(|line| line.starts_with(&format!("wrong    {check}: ")));
        assert!(found, "{file}: {}", said(&output));
    }
}
