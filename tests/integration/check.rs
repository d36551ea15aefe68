//! `claviger serve --check`: all that is wrong, at once, and nothing changed.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Output;

use crate::support::program::{Program, Served, claviger};

fn check(config: &Path, more: &[&str]) -> Output {
    let arguments = ["serve", "--check", "--config", config.to_str().unwrap()];
    claviger(arguments.iter().chain(more)).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// That a broker does not start either.
fn does_not_start(config: &Path) {
    let output = claviger(["serve", "--config", config.to_str().unwrap()]).output().unwrap();
    assert!(!output.status.success(), "{}", said(&output));
}

/// Every path below a folder, and what the files hold.
fn contents(folder: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        match entry.is_dir() {
            true => found.extend(contents(&entry)),
            false => found.push((entry.clone(), std::fs::read(&entry).unwrap())),
        }
    }
    found.sort();
    found
}

#[test]
fn a_configuration_that_is_right_is_said_to_be_and_nothing_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let (config, _) = Served::configure(folder.path(), "", "");
    let before = contents(folder.path());
    let output = check(&config, &[]);
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).ends_with("a broker can start\n"), "{}", said(&output));
    assert_eq!(contents(folder.path()), before, "no key, no folder, no socket");
}

#[test]
fn everything_that_is_wrong_is_said_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().display();
    let tls = format!(
        "tls = {{ address = \"127.0.0.1:0\", certificate = \"{place}/none.pem\", key = \"{place}/none.key\" }}"
    );
    let (config, policies) = Served::configure(folder.path(), &tls, "");
    std::fs::write(policies.join("broken.cedar"), "permit (").unwrap();
    std::fs::write(folder.path().join("root.key"), "short").unwrap();
    std::fs::create_dir(folder.path().join("data")).unwrap();
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(folder.path().join("data"), open).unwrap();
    std::fs::write(folder.path().join("broker.sock"), "not a socket").unwrap();
    let before = contents(folder.path());
    let output = check(&config, &["--output", "json"]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let problems: Vec<_> = report["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|finding| finding["level"] == "error")
        .map(|finding| finding["place"].as_str().unwrap())
        .collect();
    for place in ["kv.directory", "root_key", "policy.directory", "listen.unix", "listen.tls"] {
        assert!(problems.contains(&place), "{place} in {problems:?}");
    }
    assert!(!said(&output).contains("short"), "nothing of a key file is shown");
    assert_eq!(contents(folder.path()), before);
}

#[test]
fn a_mistake_in_the_file_has_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let (config, _) = Served::configure(folder.path(), "drain = \"soon\"", "");
    let output = check(&config, &[]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains(":5:1: listen.drain: "), "{}", said(&output));
}

#[test]
fn mistakes_in_the_file_do_not_hide_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let staging = "[environments.staging]\naws.region = \"eu-central-1\"\nsource_addresses = []";
    let (config, _) = Served::configure(folder.path(), "drain = \"soon\"\nconnections = 0", staging);
    let output = check(&config, &[]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let places = [
        "listen.drain",
        "listen.connections",
        "environments.staging.aws",
        "environments.staging.source_addresses",
    ];
    for place in places {
        assert!(said(&output).contains(&format!(": {place}: ")), "{place} in {}", said(&output));
    }
    assert!(said(&output).ends_with(": 4 problems\n"), "{}", said(&output));
    does_not_start(&config);
}

#[test]
fn two_doors_on_one_address_are_both_named() {
    let folder = tempfile::tempdir().unwrap();
    let somebody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = somebody.local_addr().unwrap();
    let (config, _) = Served::configure(folder.path(), &format!("tcp = \"{tcp}\""), "");
    let good = std::fs::read_to_string(&config).unwrap();
    let port = tcp.port();
    let find_both = |admins: &[String]| {
        for admin in admins {
            std::fs::write(&config, good.replace("admin = \"127.0.0.1:0\"", &format!("admin = \"{admin}\"")))
                .unwrap();
            let output = check(&config, &[]);
            assert_eq!(output.status.code(), Some(1), "{}", said(&output));
            let expected = format!("error    listen.admin: {admin} is taken by listen.tcp ({tcp}); ");
            assert!(said(&output).contains(&expected), "{expected} in {}", said(&output));
        }
    };
    let admins = [tcp.to_string(), format!("0.0.0.0:{port}")];
    find_both(&admins);
    let output = check(&config, &[]);
    assert!(said(&output).contains("warning  listen.tcp: "), "the broker that runs: {}", said(&output));
    drop(somebody);
    find_both(&admins);
}

#[test]
fn a_socket_whose_path_is_too_long_is_a_problem() {
    let folder = tempfile::tempdir().unwrap();
    let others = folder.path().as_os_str().len() + "//broker.sock".len();
    for length in [107, 108] {
        let deep = folder.path().join("x".repeat(length - others));
        std::fs::create_dir(&deep).unwrap();
        let (config, _) = Served::configure(&deep, "", "");
        let output = check(&config, &[]);
        assert_eq!(output.status.success(), length == 107, "{}", said(&output));
        if length == 108 {
            assert!(said(&output).contains("error    listen.unix: "), "{}", said(&output));
            does_not_start(&config);
        }
    }
}

#[test]
fn modes_that_a_start_refuses_are_problems() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = Served::start(folder.path()).program;
    assert!(program.signal(rustix::process::Signal::TERM).success());
    let config = folder.path().join("broker.toml");
    let set_mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    for (path, place, bad, good) in [
        ("data/keys", "kv.directory", 0o755, 0o700),
        ("data/claviger.db", "kv", 0o644, 0o600),
        ("data/claviger.db.lock", "kv", 0o666, 0o600),
    ] {
        let path = folder.path().join(path);
        set_mode(&path, bad);
        let output = check(&config, &[]);
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        let expected = format!("error    {place}: {}", path.display());
        assert!(said(&output).contains(&expected), "{expected} in {}", said(&output));
        does_not_start(&config);
        set_mode(&path, good);
    }
    let before = contents(folder.path());
    let mended = check(&config, &[]);
    assert!(mended.status.success(), "{}", said(&mended));
    assert_eq!(contents(folder.path()), before);
}

#[test]
fn online_asks_the_stores_and_leaves_those_of_a_running_broker_alone() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path());
    assert!(served.program.put("development", "x", b"v").status.success());
    let config = folder.path().join("broker.toml");
    for online in [&["--online"][..], &[]] {
        let running = said(&check(&config, online));
        assert_eq!(running.matches("is open in a broker that runs").count(), 1, "{running}");
    }
    assert_eq!(served.program.ok(["get", "-e", "development", "x"]), "v");
    let mut program: Program = served.program;
    assert!(program.signal(rustix::process::Signal::TERM).success());
    let offline = said(&check(&config, &[]));
    assert!(offline.contains("whether it fits the database is checked with --online"), "{offline}");
    let stopped = check(&config, &["--online"]);
    assert!(!said(&stopped).contains("is checked with --online"), "{}", said(&stopped));
    assert!(stopped.status.success(), "{}", said(&stopped));
    assert!(said(&stopped).contains("opens with the root key"), "{}", said(&stopped));
    std::fs::write(folder.path().join("root.key"), "0".repeat(63) + "1").unwrap();
    let foreign = check(&config, &["--online"]);
    assert_eq!(foreign.status.code(), Some(1));
    assert!(said(&foreign).contains("error    kv: "), "{}", said(&foreign));
    let nobody = "[environments.staging]\nstore = \"aws\"\n[environments.staging.aws]\nregion = \"eu-central-1\"\nendpoint = \"http://127.0.0.1:9\"";
    let (config, _) = Served::configure(folder.path(), "", nobody);
    let away = check(&config, &["--online"]);
    assert_eq!(away.status.code(), Some(1));
    assert!(said(&away).contains("error    environments.staging: "), "{}", said(&away));
}

#[test]
fn policies_that_others_may_write_are_warned_of() {
    let folder = tempfile::tempdir().unwrap();
    let (config, policies) = Served::configure(folder.path(), "", "");
    let everyone = std::fs::Permissions::from_mode(0o666);
    std::fs::set_permissions(policies.join("ci.cedar"), everyone).unwrap();
    let output = check(&config, &[]);
    assert!(output.status.success(), "{}", said(&output));
    let warned = said(&output).contains("ci.cedar: group or others may write it");
    assert!(warned, "{}", said(&output));
}

#[test]
fn a_log_that_was_cut_is_found_online() {
    let folder = tempfile::tempdir().unwrap();
    let mut served = Served::start(folder.path());
    assert!(served.program.put("development", "x", b"v").status.success());
    assert!(served.program.signal(rustix::process::Signal::TERM).success());
    let config = folder.path().join("broker.toml");
    let whole = check(&config, &["--online"]);
    assert!(said(&whole).contains("the audit log is whole"), "{}", said(&whole));
    let chain = folder.path().join("data/audit/broker");
    let segment = std::fs::read_dir(chain)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
        .unwrap();
    let text = std::fs::read_to_string(&segment).unwrap();
    let lines: Vec<_> = text.lines().collect();
    std::fs::write(&segment, lines[..lines.len() - 2].join("\n") + "\n").unwrap();
    let cut = check(&config, &["--online"]);
    assert_eq!(cut.status.code(), Some(1), "{}", said(&cut));
    assert!(said(&cut).contains("the audit log is not whole"), "{}", said(&cut));
}
