//! The commands as people type them, against a running broker: the embedded store, and AWS Secrets Manager.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::Signal;

use crate::support::moto::{FaultProxy, Mode, Moto};
use crate::support::program::{Program, claviger, with_input};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Writes a manifest and gives its path.
fn manifest(folder: &Path, content: &str) -> String {
    let path = folder.join("claviger.toml");
    fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

const DATABASE: &str = r#"
[env]
DB_HOST = "database#host"
DB_PORT = "database#port"
DB_PASSWORD = { ref = "database#password", min_length = 8 }
LOG_LEVEL = { value = "info" }

[environments.development]
LOG_LEVEL = { value = "debug" }
"#;

#[test]
fn exec_starts_a_program_whose_variables_come_from_the_embedded_store() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let manifest = manifest(folder.path(), DATABASE);
    let script = r#"printf '%s|%s|%s|%s' "$DB_HOST" "$DB_PORT" "${#DB_PASSWORD}" "$LOG_LEVEL""#;
    let arguments = ["exec", "-e", "development", "-m", &manifest, "--", "sh", "-c", script];
    assert_eq!(program.ok(arguments), "localhost|5432|32|debug");

    // Without a manifest: everything that the caller may read.
    let all = program.ok(["exec", "-e", "staging", "--", "env"]);
    for name in
        ["DATABASE_HOST=database.staging.internal", "REDIS_PORT=6379", "JWT_SECRET=", "API_KEYS_NEWS="]
    {
        assert!(all.contains(name), "{name} in {all}");
    }
    let pristine = program.ok(["exec", "-e", "staging", "--pristine", "-m", &manifest, "--", "env"]);
    assert!(!pristine.contains("CLAVIGER_TOKEN") && pristine.contains("DB_PORT=5432"), "{pristine}");

    // One record for each secret that was read, decided by a policy.
    let records = program.ok([
        "audit",
        "query",
        "--action",
        "read",
        "--environment",
        "development",
        "--output",
        "json",
    ]);
    assert!(
        records.contains("\"secret\":\"database\"") || records.contains("\"secret\": \"database\""),
        "{records}"
    );
}

#[test]
fn b9_exec_names_everything_that_is_missing_at_once_and_starts_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let manifest = manifest(
        folder.path(),
        "[env]\nONE = \"nothing#x\"\nTWO = \"database#nope\"\nTHREE = { ref = \"database#port\", min_length = 9 }\nFOUR = \"database#host\"\n",
    );
    let witness = folder.path().join("witness");
    let touch = format!("touch {}", witness.display());
    let stderr = program.fails(125, ["exec", "-e", "development", "-m", &manifest, "--", "sh", "-c", &touch]);
    for name in ["ONE", "TWO", "THREE"] {
        assert!(stderr.contains(name), "{name} in {stderr}");
    }
    assert!(!stderr.contains("FOUR"), "{stderr}");
    assert!(!witness.exists(), "the command did not start");
}

#[test]
fn exec_ends_as_its_command_ends() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let exec = |command: &[&str]| {
        let arguments = [&["exec", "-e", "development", "--"], command].concat();
        program.run(arguments).status
    };
    assert_eq!(exec(&["sh", "-c", "exit 42"]).code(), Some(42));
    assert_eq!(exec(&["no-such-command-anywhere"]).code(), Some(127));
    assert_eq!(exec(&["/etc/passwd"]).code(), Some(126));
    use std::os::unix::process::ExitStatusExt as _;
    assert_eq!(exec(&["sh", "-c", "kill -TERM $$"]).signal(), Some(15));
    let mut nowhere =
        claviger(["exec", "-e", "development", "-a", "unix:///nonexistent/x.sock", "--", "true"]);
    assert_eq!(nowhere.output().unwrap().status.code(), Some(125));
}

#[test]
fn exit_codes_say_what_went_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let stderr = program.fails(2, ["get", "database"]);
    assert!(stderr.contains("CLAVIGER_ENV"), "no environment is ever a default: {stderr}");
    program.fails(2, ["get", "-e", "development", "a//b"]);
    program.fails(4, ["get", "-e", "development", "missing"]);
    program.fails(4, ["get", "-e", "development", "database#missing"]);
    program.fails(4, ["get", "-e", "nowhere", "database"]);
    program.fails(7, ["rollback", "-e", "production", "database"]);
    program.fails(7, ["delete", "-e", "production", "database", "--yes"]);
    let conflict = with_input(program.command(["put", "-e", "development", "database", "--create"]), b"x");
    assert_eq!(conflict.status.code(), Some(6), "{}", text(&conflict.stderr));
    let nobody = claviger(["get", "-e", "development", "-a", "unix:///nonexistent/x.sock", "database"])
        .output()
        .unwrap();
    assert_eq!(nobody.status.code(), Some(5), "{}", text(&nobody.stderr));

    let token = program.ok(["token", "create", "--user", "eve", "--expires", "1h"]);
    let denied = program
        .command(["get", "-e", "development", "database"])
        .env("CLAVIGER_TOKEN", token.trim())
        .output()
        .unwrap();
    assert_eq!(denied.status.code(), Some(3), "{}", text(&denied.stderr));
    assert!(text(&denied.stderr).contains("[DENIED]"), "{}", text(&denied.stderr));
}

#[test]
fn b12_a_revoked_token_is_refused_with_the_next_request() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let token = program.ok(["token", "create", "--user", "ana", "--group", "team", "--expires", "1h"]);
    let token = token.trim().to_owned();
    let read = || {
        program
            .command(["get", "-e", "development", "database#port"])
            .env("CLAVIGER_TOKEN", &token)
            .output()
            .unwrap()
    };
    assert_eq!(text(&read().stdout), "5432");
    let id = token.split('_').nth(1).unwrap();
    program.ok(["token", "revoke", id]);
    let refused = read();
    assert_eq!(refused.status.code(), Some(3));
    assert!(text(&refused.stderr).contains("revoked"), "{}", text(&refused.stderr));
    let listed = program.ok(["token", "list"]);
    assert!(listed.contains(id) && !listed.contains(token.splitn(3, '_').nth(2).unwrap()), "{listed}");
}

#[test]
fn values_come_back_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let pem = b"-----BEGIN X-----\r\nAA==\r\n-----END X-----\r\n".to_vec();
    for (name, value) in [
        ("pem", pem),
        ("binary", (0..=255).collect::<Vec<u8>>()),
        ("bom", b"\xef\xbb\xbfx".to_vec()),
        ("largest", vec![b'x'; 65_536]),
        ("template", b"{{x}} ${y} $(id)".to_vec()),
    ] {
        let put = program.put("development", name, &value);
        assert!(put.status.success(), "{name}: {}", text(&put.stderr));
        let got = program.run(["get", "-e", "development", name]);
        assert_eq!(got.stdout, value, "{name}: {}", text(&got.stderr));
    }
    let empty = program.put("development", "empty", b"");
    assert_eq!(empty.status.code(), Some(2), "{}", text(&empty.stderr));
}

#[test]
fn versions_roll_back_and_deleted_secrets_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    assert!(program.put("development", "x", b"one").status.success());
    assert!(program.put("development", "x", b"two").status.success());
    assert_eq!(program.ok(["get", "-e", "development", "x", "--label", "AWSPREVIOUS"]), "one");
    program.ok(["rollback", "-e", "development", "x"]);
    assert_eq!(program.ok(["get", "-e", "development", "x"]), "one");
    assert!(program.ok(["versions", "-e", "development", "x"]).contains("AWSCURRENT"));
    program.ok(["delete", "-e", "development", "x", "--yes"]);
    program.fails(4, ["get", "-e", "development", "x"]);
    assert!(
        !program.ok(["list", "-e", "development"]).lines().any(|line| line.starts_with("x ") || line == "x")
    );
    program.ok(["restore", "-e", "development", "x"]);
    assert_eq!(program.ok(["get", "-e", "development", "x"]), "one");
    assert!(program.ok(["describe", "-e", "development", "x", "--output", "json"]).contains("AWSPREVIOUS"));
}

/// A configuration for `serve`: policies in a folder, root as administrator, `staging` in AWS.
fn configuration(folder: &Path, endpoint: &str) -> (PathBuf, PathBuf, PathBuf) {
    let policies = folder.join("policies");
    fs::create_dir_all(&policies).unwrap();
    for (file, text) in claviger::policy::SHIPPED {
        fs::write(policies.join(file), text).unwrap();
    }
    let socket = folder.join("broker.sock");
    let uid = rustix::process::getuid().as_raw();
    let text = format!(
        r#"
[listen]
unix = "{socket}"
[kv]
directory = "{data}"
[root_key]
file = "{key}"
[policy]
directory = "{policies}"
[[identity.peer_credentials.callers]]
uid = {uid}
kind = "user"
id = "tester"
groups = ["administrators", "team"]
[environments.development]
[environments.staging]
store = "aws"
[environments.staging.aws]
region = "eu-central-1"
endpoint = "{endpoint}"
name_template = "{folder_name}/{{environment}}/{{name}}"
"#,
        socket = socket.display(),
        data = folder.join("data").display(),
        key = folder.join("root.key").display(),
        policies = policies.display(),
        folder_name = folder.file_name().unwrap().to_str().unwrap().trim_start_matches('.'),
    );
    let config = folder.join("broker.toml");
    fs::write(&config, text).unwrap();
    (config, socket, policies)
}

const CREDENTIALS: &[(&str, &str)] = &[
    ("AWS_ACCESS_KEY_ID", "test"),
    ("AWS_SECRET_ACCESS_KEY", "test"),
    ("AWS_EC2_METADATA_DISABLED", "true"),
];

#[tokio::test(flavor = "multi_thread")]
async fn exec_starts_a_program_whose_variables_come_from_aws() {
    let moto = Moto::start().await;
    let folder = tempfile::tempdir().unwrap();
    let (config, socket, _) = configuration(folder.path(), moto.endpoint());
    let mut program = Program::serve(&config, &socket, CREDENTIALS);
    let database = br#"{"host":"db.aws","port":6543,"password":"from-secrets-manager"}"#;
    let put = program.put("staging", "database", database);
    assert!(put.status.success(), "{}", text(&put.stderr));
    let manifest = manifest(folder.path(), DATABASE);
    let script = r#"printf '%s|%s|%s|%s' "$DB_HOST" "$DB_PORT" "$DB_PASSWORD" "$LOG_LEVEL""#;
    let arguments = ["exec", "-e", "staging", "-m", &manifest, "--", "sh", "-c", script];
    assert_eq!(program.ok(arguments), "db.aws|6543|from-secrets-manager|info");
    assert_eq!(program.ok(arguments), "db.aws|6543|from-secrets-manager|info");
    let reads =
        program.ok(["audit", "query", "--action", "read", "--environment", "staging", "--output", "json"]);
    assert!(reads.contains("\"store\"") && reads.contains("\"cache\""), "fetched once, then cached: {reads}");
    assert!(program.signal(Signal::TERM).success());
}

#[tokio::test(flavor = "multi_thread")]
async fn b1_what_is_cached_stands_in_for_a_store_that_is_away_and_says_so() {
    let proxy = FaultProxy::start(Moto::start().await.endpoint()).await;
    let folder = tempfile::tempdir().unwrap();
    let (config, socket, _) = configuration(folder.path(), proxy.endpoint());
    let short = fs::read_to_string(&config).unwrap();
    fs::write(&config, short.replace("store = \"aws\"", "store = \"aws\"\nttl = \"200ms\"")).unwrap();
    let program = Program::serve(&config, &socket, CREDENTIALS);
    assert!(program.put("staging", "x", b"v").status.success());
    assert_eq!(program.ok(["get", "-e", "staging", "x"]), "v");
    proxy.set(Mode::Unavailable);
    // Within its time to live the value is fresh; then it is stale, and the answer says so.
    let stale =
        (0..5_000).map(|_| program.ok(["get", "-e", "staging", "x", "--output", "json"])).find(|answer| {
            let answer: serde_json::Value = serde_json::from_str(answer).unwrap();
            assert_eq!(answer["value"], "v");
            answer["stale"] == true
        });
    assert!(stale.is_some(), "the time to live ends");
    let recorded =
        program.ok(["audit", "query", "--environment", "staging", "--limit", "1", "--output", "json"]);
    assert!(recorded.contains("\"stale\":true") || recorded.contains("\"stale\": true"), "{recorded}");
    program.fails(5, ["get", "-e", "staging", "x", "--refresh"]);
    program.fails(5, ["get", "-e", "staging", "never-seen"]);
    proxy.set(Mode::Deny);
    let denied = (0..5_000).any(|_| !program.run(["get", "-e", "staging", "x"]).status.success());
    assert!(denied, "a store that refuses is not an outage: nothing is served in its place");
}

#[tokio::test(flavor = "multi_thread")]
async fn b22_a_policy_broken_on_reload_leaves_the_last_good_set_in_force() {
    let folder = tempfile::tempdir().unwrap();
    let (config, socket, policies) = configuration(folder.path(), "http://127.0.0.1:9");
    let program = Program::serve(&config, &socket, CREDENTIALS);
    assert!(program.put("development", "x", b"v").status.success());
    fs::write(policies.join("zz.cedar"), "@id(\"zz\") permit (principal, acti").unwrap();
    program.wait_for_log("policies not reloaded");
    assert_eq!(program.ok(["get", "-e", "development", "x"]), "v");
    fs::write(
        policies.join("zz.cedar"),
        "@id(\"zz\") forbid (principal == User::\"tester\", action == Action::\"read\", resource);",
    )
    .unwrap();
    program.wait_for_log("policies reloaded");
    program.fails(3, ["get", "-e", "development", "x"]);
    fs::remove_file(policies.join("zz.cedar")).unwrap();
    rustix::process::kill_process(program.id(), Signal::HUP).unwrap();
    program.wait_for_log("generation=3");
    assert_eq!(program.ok(["get", "-e", "development", "x"]), "v");
    let refused = program.ok(["audit", "query", "--limit", "1000", "--output", "json"]);
    assert!(refused.contains("INVALID_POLICY"), "the refused set is on record");
}

#[test]
fn policies_are_reloaded_on_demand_and_a_broken_set_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (config, socket, policies) = configuration(folder.path(), "http://127.0.0.1:9");
    let program = Program::serve(&config, &socket, CREDENTIALS);
    assert!(program.put("development", "x", b"v").status.success());
    fs::write(policies.join("zz.cedar"), "@id(\"zz\") permit (principal, acti").unwrap();
    let refused = program.fails(1, ["policy", "reload"]);
    assert!(refused.contains("zz.cedar") && refused.contains("[INVALID_POLICY]"), "{refused}");
    assert_eq!(program.ok(["get", "-e", "development", "x"]), "v", "the last good set is in force");

    let forbid = "@id(\"zz\") forbid (principal == User::\"tester\", action == Action::\"read\", resource);";
    fs::write(policies.join("zz.cedar"), forbid).unwrap();
    // The broker sees by itself that the folder changed; whichever comes first, the answer is about the mended set.
    let reloaded = program.ok(["policy", "reload", "--output", "json"]);
    let reloaded: serde_json::Value = serde_json::from_str(&reloaded).unwrap();
    assert!(reloaded["generation"].as_u64().unwrap() >= 2, "{reloaded}");
    assert!(reloaded["policies"].as_u64().unwrap() > 1 && reloaded["warnings"].is_array(), "{reloaded}");
    program.fails(3, ["get", "-e", "development", "x"]);
    let shown = program.ok(["policy", "reload"]);
    assert!(shown.contains(&format!("policies in force: {}; generation ", reloaded["policies"])), "{shown}");

    let token = program.ok(["token", "create", "--user", "eve", "--expires", "1h"]);
    let mut stranger = program.command(["policy", "reload"]);
    let denied = stranger.env("CLAVIGER_TOKEN", token.trim()).output().unwrap();
    assert_eq!(denied.status.code(), Some(3), "{}", text(&denied.stderr));
}

#[test]
fn a_broker_that_can_not_start_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let (config, _, policies) = configuration(folder.path(), "http://127.0.0.1:9");
    let serve = || {
        let output = claviger(["serve".as_ref(), "--config".as_ref(), config.as_os_str()]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
        text(&output.stderr)
    };
    let good = fs::read_to_string(&config).unwrap();
    fs::write(&config, good.replace("[listen]", "[listen]\nunxi = \"x\"")).unwrap();
    assert!(serve().contains("unknown key `unxi`; did you mean `unix`?"));
    fs::write(&config, &good).unwrap();
    for (file, _) in claviger::policy::SHIPPED {
        if file.ends_with(".cedar") {
            fs::remove_file(policies.join(file)).unwrap();
        }
    }
    let stderr = serve();
    assert!(stderr.contains("[INVALID_POLICY]"), "no policy set, no broker: {stderr}");
    let missing = claviger(["serve", "--config", "/nonexistent.toml"]).output().unwrap();
    assert!(text(&missing.stderr).contains("/nonexistent.toml"), "{}", text(&missing.stderr));
}

#[test]
fn the_throw_away_broker_runs_a_command_and_goes() {
    let output = claviger(["dev", "--", "sh", "-c", r#"echo "$DB_USER@$DB_HOST:$DB_PORT/$DB_NAME"; exit 3"#])
        .output()
        .unwrap();
    assert_eq!(text(&output.stdout), "app@localhost:5432/app_development\n", "{}", text(&output.stderr));
    assert_eq!(output.status.code(), Some(3));
    for (command, code) in [
        (["dev", "-e", "nowhere", "--", "true"], 125),
        (["dev", "-e", "staging", "--", "nosuchcommand"], 127),
    ] {
        assert_eq!(claviger(command).output().unwrap().status.code(), Some(code), "{command:?}");
    }
}

#[test]
fn b38_two_brokers_do_not_share_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let _first = Program::dev(folder.path());
    let data = folder.path().join("data");
    let second = claviger(["dev".as_ref(), "--data".as_ref(), data.as_os_str()]).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(text(&second.stderr).contains("[LOCKED]"), "{}", text(&second.stderr));
}

#[test]
fn policies_and_the_log_answer_through_the_broker() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let explained = program.run([
        "policy",
        "explain",
        "read",
        "database",
        "-e",
        "production",
        "--as",
        "user:ana",
        "--group",
        "team",
    ]);
    assert!(
        text(&explained.stdout).contains("may not"),
        "{}{}",
        text(&explained.stdout),
        text(&explained.stderr)
    );
    let explained = program.run([
        "policy",
        "explain",
        "read",
        "database",
        "-e",
        "development",
        "--as",
        "user:ana",
        "--group",
        "team",
    ]);
    assert!(!text(&explained.stdout).contains("may not"), "{}", text(&explained.stdout));
    program.fails(4, ["policy", "explain", "read", "database", "-e", "nowhere"]);
    let verified = program.ok(["audit", "verify"]);
    assert!(verified.contains("whole"), "{verified}");
    let records = program.ok(["audit", "query", "--limit", "1000", "--output", "json"]);
    assert!(
        records.contains("explain_policy") && records.contains("verify_audit"),
        "questions are on record too"
    );
}

#[test]
fn a_tail_follows_the_log_and_ends_with_its_token() {
    use std::io::{BufRead as _, BufReader};
    use std::process::Stdio;

    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let token = program.ok(["token", "create", "--user", "aud", "--group", "auditors", "--expires", "1h"]);
    let mut tail = program
        .command(["audit", "tail", "--output", "json"])
        .env("CLAVIGER_TOKEN", token.trim())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(tail.stdout.take().unwrap()).lines().map_while(Result::ok);
    // Its own record may come before or after it follows; what is asked for again and again is seen for sure.
    let seen = std::sync::atomic::AtomicBool::new(false);
    let asking = std::thread::scope(|scope| {
        let asker = scope.spawn(|| {
            while !seen.load(std::sync::atomic::Ordering::Relaxed) {
                program.ok(["get", "-e", "development", "jwt"]);
            }
        });
        let found = lines
            .by_ref()
            .any(|line| line.contains("\"secret\":\"jwt\"") || line.contains("\"secret\": \"jwt\""));
        seen.store(true, std::sync::atomic::Ordering::Relaxed);
        asker.join().unwrap();
        found
    });
    assert!(asking, "the tail shows what happens");
    program.ok(["token", "revoke", token.trim().split('_').nth(1).unwrap()]);
    program.ok(["get", "-e", "development", "jwt"]);
    assert!(lines.count() < 10_000, "the stream ends");
    assert_eq!(tail.wait().unwrap().code(), Some(3));
}

#[test]
fn a_deleted_sample_does_not_keep_dev_from_starting() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = Program::dev(folder.path());
    program.ok(["delete", "-e", "development", "jwt", "--yes"]);
    assert!(program.signal(Signal::HUP).success(), "a terminal that goes away is an orderly end");
    let program = Program::dev(folder.path());
    program.ok(["restore", "-e", "development", "jwt"]);
    program.ok(["get", "-e", "development", "jwt"]);
}

/// Stops the broker, does something to its folder, and says how the next start ends.
fn after(folder: &Path, tamper: impl FnOnce(&Path)) -> String {
    let data = folder.join("data");
    tamper(&data);
    let mut command =
        claviger(["dev".as_ref(), "--data".as_ref(), data.as_os_str(), "--".as_ref(), "true".as_ref()]);
    text(&command.output().unwrap().stderr)
}

#[test]
fn a_log_that_was_cut_or_removed_is_noticed_and_can_be_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = Program::dev(folder.path());
    program.ok(["get", "-e", "development", "jwt"]);
    assert!(program.signal(Signal::TERM).success());
    let stderr = after(folder.path(), |data| fs::remove_dir_all(data.join("audit")).unwrap());
    assert!(stderr.contains("[AUDIT_BROKEN]") && stderr.contains("--accept-loss"), "{stderr}");
    let data = folder.path().join("data");
    let mut accepted = claviger([
        "dev".as_ref(),
        "--accept-loss".as_ref(),
        "--data".as_ref(),
        data.as_os_str(),
        "--".as_ref(),
        "true".as_ref(),
    ]);
    let accepted = accepted.output().unwrap();
    assert!(accepted.status.success(), "{}", text(&accepted.stderr));
    let mut log = String::new();
    for entry in fs::read_dir(data.join("audit/dev")).unwrap() {
        log += &fs::read_to_string(entry.unwrap().path()).unwrap_or_default();
    }
    assert!(log.contains("\"kind\":\"lost\""), "{log}");
    let stderr = after(folder.path(), |_| {});
    assert_eq!(stderr, "", "and from then on it is whole again");
}
