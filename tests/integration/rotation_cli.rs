//! `claviger rotate` and `claviger rotation` as people and cron jobs type them, against a running broker.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::program::{Program, Served, with_input};

/// How long anything may take before a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(60);

const RANDOM: &str =
    "rotator = \"random\"\nschedule = \"every 30d\"\ngrace = \"1s\"\n\n[random]\nfield = \"news\"\n";

/// Nobody listens there: the current value can be made, and the target never answers.
const AWAY: &str = "rotator = \"postgresql-alternating\"\nschedule = \"every 30d\"\ngrace = \"1s\"\n\n\
                    [postgresql-alternating]\nhosts = [\"127.0.0.1:1\"]\ndatabase = \"app\"\n\
                    users = [\"app\", \"app_b\"]\nowner = \"app_owner\"\nadmin = \"database-admin\"\ntls = \"disable\"\n";

/// How a command ended: its code, and what it wrote.
fn ended(output: Output) -> (i32, String, String) {
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (output.status.code().expect("it ended by itself"), text(output.stdout), text(output.stderr))
}

fn in_development<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    [arguments, &["-e", "development"]].concat()
}

fn json(program: &Program, arguments: &[&str]) -> Value {
    let arguments = in_development(&[arguments, &["--output", "json"]].concat());
    serde_json::from_str(&program.ok(arguments)).expect("a document")
}

fn current(program: &Program, name: &str) -> String {
    let versions = json(program, &["versions", name]);
    let is_current = |version: &&Value| version["labels"].as_array().unwrap().contains(&"AWSCURRENT".into());
    let current =
        versions["versions"].as_array().unwrap().iter().find(is_current).expect("a current version");
    current["version_id"].as_str().unwrap().to_owned()
}

fn set(program: &Program, name: &str, definition: &str) {
    let arguments = in_development(&["rotation", "set", name, "--file", "-"]);
    let (code, _, stderr) = ended(with_input(program.command(arguments), definition.as_bytes()));
    assert_eq!(code, 0, "{stderr}");
}

/// A rotation whose target is away.
fn away(program: &Program) {
    let admin = br#"{"username":"postgres","password":"never-asked-for"}"#;
    let (code, _, stderr) = ended(program.put("development", "database-admin", admin));
    assert_eq!(code, 0, "{stderr}");
    set(program, "database", AWAY);
}

/// A command that runs while a test looks at what it says on standard error.
struct Running {
    child: Child,
    said: Receiver<String>,
    heard: Vec<String>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
        let stderr = BufReader::new(child.stderr.take().expect("a pipe"));
        let (say, said) = channel();
        std::thread::spawn(move || {
            // Who hears no more has ended with its test.
            stderr.lines().map_while(Result::ok).all(|line| say.send(line).is_ok());
        });
        Self { child, said, heard: Vec::new() }
    }

    fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + HUNG;
        while !self.heard.last().is_some_and(|line| line.contains(text)) {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.said.recv_timeout(left) else { panic!("no `{text}` in {:?}", self.heard) };
            self.heard.push(line);
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    /// The code, standard output, and all of standard error.
    fn ended(mut self) -> (i32, String, String) {
        let deadline = Instant::now() + HUNG;
        while let Ok(line) = self.said.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            self.heard.push(line);
        }
        let mut stdout = String::new();
        self.child.stdout.take().expect("a pipe").read_to_string(&mut stdout).expect("text");
        let status = self.child.wait().expect("it ends");
        (status.code().expect("it ended by itself"), stdout, self.heard.join("\n"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn rotate_waits_for_the_new_version_and_says_which_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let (before, old) = (current(&program, "jwt"), program.ok(in_development(&["get", "jwt#secret"])));
    let (code, stdout, stderr) = ended(program.run(in_development(&["rotate", "jwt"])));
    assert_eq!(code, 0, "{stderr}");
    assert!(!stderr.contains("development:jwt"), "no bar where nobody looks at one: {stderr}");
    let after = current(&program, "jwt");
    assert_eq!(stdout, format!("development:jwt  rotated  {after}\n"));
    assert_ne!(after, before);
    let new = program.ok(in_development(&["get", "jwt#secret"]));
    assert!(new != old && new.len() == 128, "64 bytes as hex");

    // Users may still hold the value before it.
    let stderr = program.fails(6, in_development(&["rotate", "jwt"]));
    assert!(stderr.contains("[ROTATION_TOO_SOON]") && stderr.contains("jwt"), "{stderr}");
    assert_eq!(current(&program, "jwt"), after);

    let history = json(&program, &["rotation", "history", "jwt"]);
    let [only] = &history["history"].as_array().unwrap()[..] else { panic!("{history}") };
    assert_eq!((&only["ending"], &only["version_id"]), (&"rotated".into(), &after.as_str().into()));
    assert!(!only["asked_by"].as_str().unwrap().is_empty(), "{only}");
    let status = json(&program, &["rotation", "status", "jwt"]);
    assert_eq!((&status["health"], &status["rotator"]), (&"idle".into(), &"jwt-secret".into()));
    assert!(status["run"].is_null() && status["rotated_at"].is_string() && status["next_at"].is_string());
    assert!(status["min_gap_seconds"].as_i64().unwrap() > 0, "{status}");
    let shown = program.ok(in_development(&["rotation", "status", "jwt"]));
    assert!(shown.contains("health       idle\n") && shown.contains(" (in "), "{shown}");
}

#[test]
fn several_are_rotated_at_once_and_the_worst_decides_the_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    set(&program, "api-keys", RANDOM);
    let email = program.ok(in_development(&["get", "api-keys#email"]));
    let arguments = in_development(&["rotate", "redis", "jwt", "api-keys", "jwt", "--output", "json"]);
    let (code, stdout, stderr) = ended(program.run(arguments));
    assert_eq!(code, 4, "{stderr}");
    assert!(stderr.contains("ROTATION_NOT_FOUND") && stderr.contains("redis"), "{stderr}");
    let document: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((&document["done"], &document["total"]), (&2.into(), &3.into()));
    let seen: Vec<_> = document["rotations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| [&one["name"], &one["result"], &one["error"]["reason"]].map(|value| value.as_str()))
        .collect();
    let expected = [
        [Some("api-keys"), Some("rotated"), None],
        [Some("jwt"), Some("rotated"), None],
        [Some("redis"), None, Some("ROTATION_NOT_FOUND")],
    ];
    assert_eq!(seen, expected);
    assert_eq!(program.ok(in_development(&["get", "api-keys#email"])), email, "the rest is kept");
}

#[test]
fn r3_several_who_rotate_at_the_same_time_make_one_rotation() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let arguments = in_development(&["rotate", "jwt", "--no-wait", "--output", "json"]);
    let start = || {
        let mut command = program.command(&arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts")
    };
    let racing: Vec<Child> = (0..6).map(|_| start()).collect();
    let outcomes: Vec<_> = racing.into_iter().map(|child| ended(child.wait_with_output().unwrap())).collect();
    let after = current(&program, "jwt");
    let mut rotated = 0;
    for (code, stdout, stderr) in &outcomes {
        match code {
            0 => {
                let one: Value = serde_json::from_str(stdout).unwrap();
                rotated += usize::from(one["result"] == "rotated");
                assert!(one["result"] == "rotated" || one["result"] == "in_progress", "{one}");
                let version = one["version_id"].as_str();
                assert!(version.is_none_or(|version| version == after), "one token for all: {one}");
            }
            _ => assert!(*code == 6 && stderr.contains("ROTATION_TOO_SOON"), "{code}: {stderr}"),
        }
    }
    assert_eq!(rotated, 1, "{outcomes:?}");
    let history = json(&program, &["rotation", "history", "jwt"]);
    assert_eq!(history["history"].as_array().unwrap().len(), 1, "{history}");
}

#[test]
fn rotations_are_set_paused_resumed_and_removed() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    set(&program, "api-keys", RANDOM);
    let list = json(&program, &["rotation", "list"]);
    let names = |list: &Value| -> BTreeSet<String> {
        let rotations = list["rotations"].as_array().unwrap().iter();
        rotations.map(|one| one["name"].as_str().unwrap().to_owned()).collect()
    };
    assert!(names(&list).is_superset(&["api-keys".to_owned(), "jwt".to_owned()].into()), "{list}");
    assert_eq!(list["more"], false);
    let first = json(&program, &["rotation", "list", "--limit", "1"]);
    assert_eq!((names(&first).len(), &first["more"]), (1, &true.into()));
    let table = program.ok(in_development(&["rotation", "list"]));
    assert!(table.starts_with("NAME ") && table.contains("every 30d"), "{table}");

    // What is shown of a definition sets the same again.
    let shown = json(&program, &["rotation", "status", "api-keys"]);
    set(&program, "api-keys", shown["definition"].as_str().unwrap());
    let again = json(&program, &["rotation", "status", "api-keys"]);
    assert_eq!(again["definition"], shown["definition"]);

    let before = current(&program, "api-keys");
    let said = program.ok(in_development(&["rotation", "pause", "api-keys"]));
    assert_eq!(said, "development:api-keys: paused\n");
    assert_eq!(json(&program, &["rotation", "status", "api-keys"])["health"], "paused");
    let stderr = program.fails(6, in_development(&["rotate", "api-keys"]));
    assert!(stderr.contains("paused"), "{stderr}");
    assert_eq!(current(&program, "api-keys"), before);
    let said = program.ok(in_development(&["rotation", "resume", "api-keys"]));
    assert!(said.starts_with("development:api-keys: resumed; next "), "{said}");
    program.ok(in_development(&["rotate", "api-keys"]));
    assert_ne!(current(&program, "api-keys"), before);

    program.ok(in_development(&["rotation", "remove", "api-keys"]));
    for arguments in [["rotation", "status", "api-keys"], ["rotation", "remove", "api-keys"]] {
        let stderr = program.fails(4, in_development(&arguments));
        assert!(stderr.contains("[ROTATION_NOT_FOUND]"), "{stderr}");
    }
    program.fails(4, in_development(&["rotate", "api-keys"]));
    program.fails(6, in_development(&["rotation", "abort", "jwt"]));
}

#[test]
fn a_definition_that_can_not_be_is_refused_and_sets_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let too_large = "#".repeat(64 * 1024 + 1);
    let misspelt = "rotator = \"rabdom\"\nschedule = \"every 30d\"\n";
    for (bad, exit, reason) in [
        ("", 2, "INVALID_ARGUMENT"),
        ("rotator = ", 1, "INVALID_CONFIG"),
        (misspelt, 1, "INVALID_CONFIG"),
        (&too_large, 2, "INVALID_ARGUMENT"),
    ] {
        let arguments = in_development(&["rotation", "set", "redis", "--file", "-"]);
        let (code, _, stderr) = ended(with_input(program.command(arguments), bad.as_bytes()));
        assert_eq!(code, exit, "{stderr}");
        assert!(stderr.contains(&format!("[{reason}]")), "{stderr}");
    }
    program.fails(4, in_development(&["rotation", "status", "redis"]));
}

#[test]
fn who_may_not_rotate_is_told_so() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let before = current(&program, "jwt");
    program.fails(7, ["rotate", "-e", "production", "jwt"]);
    let token = program.ok(["token", "create", "--user", "eve", "--expires", "1h"]);
    for (arguments, code) in [
        (&["rotate", "jwt"][..], 3),
        (&["rotate", "jwt", "redis"], 3),
        (&["rotation", "status", "jwt"], 3),
        (&["rotation", "list"], 3),
        (&["rotation", "pause", "jwt"], 3),
        (&["rotation", "remove", "jwt"], 3),
    ] {
        let mut command = program.command(in_development(arguments));
        let (found, _, stderr) = ended(command.env("CLAVIGER_TOKEN", token.trim()).output().unwrap());
        assert_eq!(found, code, "{arguments:?}: {stderr}");
        assert!(stderr.contains("[DENIED]"), "{stderr}");
    }
    assert_eq!(current(&program, "jwt"), before);
    assert_eq!(json(&program, &["rotation", "status", "jwt"])["health"], "idle");
}

#[test]
fn what_needs_a_person_is_said_in_three_lines_with_the_mend() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    set(&program, "redis", RANDOM);
    let (code, stdout, stderr) = ended(program.run(in_development(&["rotate", "redis"])));
    assert_eq!(code, 1, "{stderr}");
    assert!(stdout.starts_with("development:redis  blocked"), "{stdout}");
    let lines: Vec<&str> = stderr.lines().filter(|line| line.contains("development:redis")).collect();
    let [trouble, message, mend] = lines[..] else { panic!("{stderr}") };
    assert_eq!(trouble, "claviger: development:redis: blocked: value_unfit");
    assert!(message.starts_with("claviger: development:redis: ") && message.contains("news"), "{message}");
    assert!(mend.starts_with("claviger: development:redis: mend: "), "{mend}");

    let status = json(&program, &["rotation", "status", "redis"]);
    assert_eq!(
        (&status["health"], &status["run"]["trouble"]["code"]),
        (&"blocked".into(), &"value_unfit".into())
    );
    let arguments = in_development(&["rotate", "redis", "--output", "json"]);
    let (code, stdout, stderr) = ended(program.run(arguments));
    assert_eq!(code, 1, "{stderr}");
    assert!(!stderr.contains("development:redis"), "it is in the document: {stderr}");
    let one: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((&one["result"], &one["trouble"]["needs_person"]), (&"blocked".into(), &true.into()));
    assert!(one["retry_at"].is_string(), "{one}");
}

#[test]
fn what_may_pass_is_tried_once_or_waited_for_and_ctrl_c_leaves_it_going_on() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    away(&program);
    let before = current(&program, "database");
    let (code, stdout, stderr) = ended(program.run(in_development(&["rotate", "database", "--no-wait"])));
    assert_eq!(code, 5, "{stderr}");
    assert!(
        stdout.starts_with("development:database  unfinished  ") && stdout.contains("  tried again "),
        "{stdout}"
    );
    assert!(stderr.contains("development:database: unfinished: target_unavailable\n"), "{stderr}");
    assert!(stderr.contains("development:database: mend: "), "{stderr}");

    let mut waiting = Running::start(program.command(in_development(&["rotate", "database"])));
    waiting.wait_for("target_unavailable");
    waiting.signal(Signal::INT);
    let (code, stdout, stderr) = waiting.ended();
    assert_eq!((code, stdout.as_str()), (130, ""), "{stderr}");
    assert!(stderr.contains("interrupted, with 0 of 1 over; what has begun goes on"), "{stderr}");
    let status = json(&program, &["rotation", "status", "database"]);
    assert_eq!(status["run"]["trouble"]["code"], "target_unavailable", "{status}");

    // The target was never touched, so that there is nothing to wait for.
    program.ok(in_development(&["rotation", "abort", "database"]));
    let aborted = || {
        let history = json(&program, &["rotation", "history", "database"]);
        history["history"].as_array().unwrap().first().is_some_and(|last| last["ending"] == "aborted")
    };
    until(aborted);
    assert_eq!(current(&program, "database"), before);
}

/// Looks until it is so.
fn until(so: impl Fn() -> bool) {
    let deadline = Instant::now() + HUNG;
    while !so() {
        assert!(Instant::now() < deadline, "hung");
    }
}

#[test]
fn a_broker_that_goes_away_is_unavailable_and_what_was_known_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = Program::dev(folder.path());
    away(&program);
    let mut waiting =
        Running::start(program.command(in_development(&["rotate", "database", "--output", "json"])));
    // What programs read says nothing on the way; that a run is there shows that it was heard.
    until(|| !json(&program, &["rotation", "status", "database"])["run"]["trouble"].is_null());
    let mut for_people = Running::start(program.command(in_development(&["rotate", "database"])));
    for_people.wait_for("development:database: ");
    program.signal(Signal::KILL);
    let (code, stdout, stderr) = for_people.ended();
    assert_eq!(code, 5, "{stderr}");
    assert!(stdout.starts_with("development:database  "), "{stdout}");
    assert!(stderr.contains("`claviger rotation status database` shows how it is"), "{stderr}");
    waiting.heard.clear();
    let (code, stdout, stderr) = waiting.ended();
    assert_eq!(code, 5, "{stderr}");
    let one: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((&one["name"], &one["error"]["reason"]), (&"database".into(), &"UNAVAILABLE".into()));
}

/// A broker whose scheduler is off, so that nobody but a cron job rotates, with an environment where little time lies
/// between two rotations.
fn without_scheduler(folder: &Path) -> Served {
    Served::with(folder, "", "[environments.brisk]\nttl = \"0s\"\n[rotation]\nscheduler = false\n")
}

#[test]
fn r33_what_is_due_is_rotated_by_whoever_asks_and_once() {
    let folder = tempfile::tempdir().unwrap();
    let served = without_scheduler(folder.path());
    let program = &served.program;
    let names = ["a", "b", "c"];
    for name in names {
        let (code, _, stderr) = ended(program.put("brisk", name, b"first"));
        assert_eq!(code, 0, "{stderr}");
        let definition = "rotator = \"random\"\nschedule = \"every 1s\"\ngrace = \"1s\"\n";
        let command = program.command(["rotation", "set", name, "--file", "-", "-e", "brisk"]);
        let (code, _, stderr) = ended(with_input(command, definition.as_bytes()));
        assert_eq!(code, 0, "{stderr}");
    }
    let due = |arguments: &[&str]| -> Value {
        let arguments = [&["rotate", "--due", "--output", "json"], arguments].concat();
        serde_json::from_str(&program.ok(arguments)).unwrap()
    };
    assert_eq!(due(&["-e", "development"]), serde_json::json!({ "rotations": [], "done": 0, "total": 0 }));
    until(|| due(&["--dry-run"])["total"] == 3);
    let shown = due(&["-e", "brisk", "--dry-run"]);
    for one in shown["rotations"].as_array().unwrap() {
        assert!(one["result"] == "due" && one["due_at"].is_string() && one["retry_at"].is_null(), "{one}");
    }
    assert_eq!(program.ok(["get", "-e", "brisk", "a"]), "first", "it was only asked");

    let crons: Vec<Running> = (0..3)
        .map(|_| Running::start(program.command(["rotate", "--due", "-e", "brisk", "--output", "json"])))
        .collect();
    let mut rotated = 0;
    for cron in crons {
        let (code, stdout, stderr) = cron.ended();
        assert_eq!(code, 0, "{stderr}");
        let document: Value = serde_json::from_str(&stdout).unwrap();
        let rotations = document["rotations"].as_array().unwrap();
        assert_eq!(
            (&document["done"], &document["total"]),
            (&rotations.len().into(), &rotations.len().into())
        );
        rotated += rotations.iter().filter(|one| one["result"] == "rotated").count();
    }
    // Who comes late may find one due again; but each rotation was made once, and told to whoever made it.
    let mut recorded = 0;
    for name in names {
        let arguments = ["rotation", "history", name, "-e", "brisk", "--output", "json"];
        let history: Value = serde_json::from_str(&program.ok(arguments)).unwrap();
        let moments: Vec<jiff::Timestamp> = history["history"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["ended_at"].as_str().unwrap().parse().unwrap())
            .collect();
        assert!(!moments.is_empty(), "{name} was due");
        let apart = moments.windows(2).map(|pair| pair[0].duration_since(pair[1]));
        assert!(apart.into_iter().all(|apart| apart.as_secs() >= 1), "{history}");
        recorded += moments.len();
    }
    assert_eq!(rotated, recorded);
}
