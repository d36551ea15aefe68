//! A value that is put in shows up nowhere but where it was asked for.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::Signal;

use crate::support::program::{Program, claviger, with_input};

/// Long, and the same in no encoding as anything else.
const CANARY: &str = "canary-Zq7vN2xK9tR4wB8m";

/// The canary as text, base64, hex and as a list of numbers: the forms in which it would leak.
fn forms() -> Vec<(&'static str, Vec<u8>)> {
    let bytes = CANARY.as_bytes();
    let numbers = bytes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    vec![
        ("text", bytes.to_vec()),
        ("base64", data_encoding::BASE64_NOPAD.encode(bytes).into_bytes()),
        ("hex", data_encoding::HEXLOWER.encode(bytes).into_bytes()),
        ("numbers", numbers.into_bytes()),
    ]
}

fn assert_clean(place: &str, content: &[u8]) {
    for (form, needle) in forms() {
        let found = content.windows(needle.len()).any(|window| window == needle);
        assert!(!found, "the canary is in {place}, as {form}");
    }
}

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.symlink_metadata().unwrap().file_type() {
            kind if kind.is_dir() => files_below(&path, found),
            kind if kind.is_file() => found.push(path),
            _ => {}
        }
    }
}

#[test]
fn a_canary_is_in_no_log_error_record_or_file() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = Program::dev(folder.path());
    let object = format!(r#"{{"password":"{CANARY}","twice":1}}"#);
    let broken = format!(r#"{{"password":"{CANARY}","password":"{CANARY}"}}"#);
    let mut said = Vec::new();
    for (name, value) in
        [("object", object.as_str()), ("broken", &broken), ("text", CANARY), ("nul", &format!("{CANARY}\0"))]
    {
        let output = program.put("development", name, value.as_bytes());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        said.extend([output.stdout, output.stderr]);
    }
    // The one place where it belongs.
    assert_eq!(program.ok(["get", "-e", "development", "object#password"]), CANARY);

    let manifest = folder.path().join("claviger.toml");
    fs::write(
        &manifest,
        "[env]\nA = \"object#missing\"\nB = \"broken#password\"\nC = \"text#field\"\nD = \"nul\"\nE = { ref = \"text\", min_length = 99 }\n",
    )
    .unwrap();
    let manifest = manifest.to_str().unwrap().to_owned();
    let large = format!("{CANARY}{}", "x".repeat(70_000));
    let wrong: Vec<Vec<&str>> = vec![
        vec!["get", "-e", "development", "object#missing"],
        vec!["get", "-e", "development", "broken#password"],
        vec!["get", "-e", "development", "text#field"],
        vec!["exec", "-e", "development", "-m", &manifest, "--", "true"],
        vec!["put", "-e", "development", "text", "--expect", "00000000000000000000000000000000"],
        vec!["put", "-e", "development", "../text"],
        vec!["describe", "-e", "development", "object"],
        vec!["audit", "query", "--limit", "1000"],
    ];
    for arguments in wrong {
        let output = with_input(program.command(&arguments), CANARY.as_bytes());
        said.extend([output.stdout, output.stderr]);
    }
    let output = with_input(program.command(["put", "-e", "development", "large"]), large.as_bytes());
    assert!(!output.status.success());
    said.extend([output.stdout, output.stderr]);
    assert!(program.signal(Signal::TERM).success());

    for output in &said {
        assert_clean("the output of a command", output);
    }
    assert!(program.log().len() > 100, "there is a log at its finest level");
    assert_clean("the broker's log", program.log().as_bytes());
    let mut files = Vec::new();
    files_below(&folder.path().join("data"), &mut files);
    assert!(files.len() >= 4, "database, keys and audit log: {files:?}");
    for file in files {
        assert_clean(&file.display().to_string(), &fs::read(&file).unwrap());
    }
}

#[test]
fn the_search_finds_a_canary_that_is_there() {
    let there = format!("{{\"x\":\"{CANARY}\"}}");
    assert!(std::panic::catch_unwind(|| assert_clean("here", there.as_bytes())).is_err());
    let numbers = format!("{:?}", CANARY.as_bytes());
    assert!(std::panic::catch_unwind(|| assert_clean("here", numbers.as_bytes())).is_err());
}

#[test]
fn a_crash_leaves_no_core_and_no_one_may_attach() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = Program::dev(folder.path());
    let process = PathBuf::from(format!("/proc/{}", program.id().as_raw_nonzero()));
    let limits = fs::read_to_string(process.join("limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    let numbers: Vec<_> = core.split_whitespace().filter(|word| word.parse::<u64>().is_ok()).collect();
    assert_eq!(numbers, ["0", "0"], "{core}");
    let status = program.signal(Signal::ABORT);
    use std::os::unix::process::ExitStatusExt as _;
    assert_eq!((status.signal(), status.core_dumped()), (Some(Signal::ABORT.as_raw()), false));
}

#[test]
fn the_root_key_is_not_in_a_dump_of_the_memory() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    program.ok(["get", "-e", "development", "database"]);
    let hex = fs::read_to_string(folder.path().join("data/keys/root.key")).unwrap();
    let key = data_encoding::HEXLOWER.decode(hex.trim().as_bytes()).unwrap();
    let prefix = folder.path().join("core");
    let pid = program.id().as_raw_nonzero().to_string();
    let dumped =
        std::process::Command::new("gcore").arg("-o").arg(&prefix).arg(&pid).output().expect("gcore (gdb)");
    let dump = fs::read(folder.path().join(format!("core.{pid}")))
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&dumped.stderr)));
    assert!(dump.len() > 1_000_000, "a dump of the whole process");
    assert!(!dump.windows(key.len()).any(|window| window == key), "the root key is in the dump, as bytes");
    let hex = hex.trim().as_bytes();
    assert!(!dump.windows(hex.len()).any(|window| window == hex), "the root key is in the dump, as text");
}

#[test]
fn a_token_is_not_handed_to_the_child() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let token = program.ok(["token", "create", "--user", "ana", "--group", "team", "--expires", "1h"]);
    let mut command = program.command(["exec", "-e", "development", "--", "env"]);
    command.env("CLAVIGER_TOKEN", token.trim());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("DATABASE_PASSWORD="), "the secrets are there");
    assert!(!text.contains("CLAVIGER_TOKEN") && !text.contains(token.trim()), "the credential is not");
}

#[test]
fn values_are_not_taken_from_the_command_line() {
    let output = claviger(["put", "-e", "development", "database", CANARY]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}
