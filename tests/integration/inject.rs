//! Injected values through real processes: what a shell's `env -0` prints, and what `exec::replace` leaves of us.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Output, Stdio};

use claviger::inject::{
    ChildEnvironment, Manifest, Options, Variables, compose, exec, from_secrets, resolve,
};
use claviger::secret::{EnvironmentName, SecretId, SecretName, SecretValue};
use proptest::prelude::*;

/// Asks the ignored test below to become this command; words are separated by the unit separator.
const COMMAND: &str = "INJECT_TEST_COMMAND";
const SEPARATOR: char = '\u{1f}';

fn text(text: &str) -> SecretValue {
    SecretValue::text(text.to_owned()).unwrap()
}

/// One variable for each field of one secret, by way of a manifest.
fn declared(values: &[(&str, &str)]) -> Variables {
    let entries: String = values
        .iter()
        .map(|(name, _)| format!("{name} = {{ ref = \"sample#{name}\", allow_empty = true }}\n"))
        .collect();
    let object: serde_json::Map<String, serde_json::Value> =
        values.iter().map(|(name, value)| ((*name).to_owned(), serde_json::Value::from(*value))).collect();
    let secret = text(&serde_json::Value::Object(object).to_string());
    let environment = EnvironmentName::parse("staging").unwrap();
    let variables =
        Manifest::parse(&format!("[env]\n{entries}"), "claviger.toml").unwrap().variables_for(&environment);
    resolve(&variables, &environment, &|_: &SecretId| Ok(secret.clone())).unwrap()
}

fn environment(variables: &Variables) -> ChildEnvironment {
    let parent = [(OsString::from("PATH"), std::env::var_os("PATH").unwrap())];
    compose(parent, variables, Options::default()).unwrap().0
}

/// What a program started by a shell sees, byte for byte.
fn seen(environment: &ChildEnvironment) -> BTreeMap<String, String> {
    let output =
        Command::new("sh").args(["-c", "env -0"]).env_clear().envs(environment.expose()).output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout)
        .unwrap()
        .split_terminator('\0')
        .map(|entry| entry.split_once('=').unwrap())
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

#[test]
fn hostile_looking_values_arrive_exactly() {
    let values = [
        ("SINGLE", "it's"),
        ("DOUBLE", "say \"so\""),
        ("COMMAND", "$(id) `id` ${HOME} $HOME"),
        ("NEWLINES", "a\nb\n\n"),
        ("INJECTION", "x\r\nADMIN=1"),
        ("TEMPLATE", "{{x}} ${x} %s %n"),
        ("BACKSLASH", "\\ \\n \\0 \\\\"),
        ("BANG", "!! !$ *?[a-z] ~ #"),
        ("UNICODE", "pässwörd 密码 🔑"),
        ("MARK", "\u{feff}begins with a byte order mark"),
        ("SPACES", "  \t "),
        ("EQUALS", "=a=b="),
        ("EMPTY", ""),
    ];
    let seen = seen(&environment(&declared(&values)));
    for (name, value) in values {
        assert_eq!(seen.get(name).map(String::as_str), Some(value), "{name}");
    }
    assert!(!seen.contains_key("ADMIN"), "a line end in a value starts no variable");
}

#[test]
fn secrets_without_a_manifest_arrive_under_derived_names() {
    let secret = |name: &str, value: &str| (SecretName::parse(name).unwrap(), text(value));
    let variables = from_secrets([
        secret("database", "{\"user-name\":\"app\",\"port\":5432,\"pass\":\"a'b\\nc\"}"),
        secret("team/api.key", "plain {{x}}"),
    ])
    .unwrap();
    let seen = seen(&environment(&variables));
    for (name, value) in [
        ("DATABASE_USER_NAME", "app"),
        ("DATABASE_PORT", "5432"),
        ("DATABASE_PASS", "a'b\nc"),
        ("TEAM_API_KEY", "plain {{x}}"),
    ] {
        assert_eq!(seen.get(name).map(String::as_str), Some(value), "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_text_without_nul_arrives_exactly(
        values in proptest::collection::vec("(?s)[^\0]{0,40}", 1..6),
    ) {
        let names: Vec<_> = (0..values.len()).map(|index| format!("VALUE_{index}")).collect();
        let pairs: Vec<_> = names.iter().zip(&values).map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let seen = seen(&environment(&declared(&pairs)));
        for (name, value) in pairs {
            prop_assert_eq!(seen.get(name).map(String::as_str), Some(value));
        }
    }
}

/// Not a test of its own: the process that is replaced, because `replace` can't be called in one that runs tests.
#[test]
#[ignore = "started by `replaced`, as a process of its own; does nothing otherwise"]
fn a_process_to_be_replaced() {
    let Some(words) = std::env::var_os(COMMAND) else { return };
    let command: Vec<OsString> = words.to_str().unwrap().split(SEPARATOR).map(OsString::from).collect();
    let parent = std::env::vars_os().filter(|(name, _)| name != COMMAND);
    let (environment, _) = compose(parent, &declared(&[("INJECTED", "a\nb")]), Options::default()).unwrap();
    let held_open = std::fs::File::open("/proc/version");
    let error = exec::replace(&command, environment);
    drop(held_open);
    eprintln!("{error}");
    std::process::exit(i32::from(error.exit_code()));
}

/// A process of this test binary that becomes `command`, with its id.
fn replaced(command: &[&str]) -> (u32, Output) {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "inject::a_process_to_be_replaced", "--ignored", "--nocapture"])
        .env(COMMAND, command.join(&SEPARATOR.to_string()))
        .env("CLAVIGER_TOKEN", "canary-5f3a")
        .env("CLAVIGER_ENV", "staging")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    (child.id(), child.wait_with_output().unwrap())
}

/// What the command printed, after the greeting of the test harness that it replaced.
fn printed(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn the_command_takes_our_place_with_its_arguments_untouched() {
    let script = "echo; echo BEGIN; echo $$; printf '<%s>\\n' \"$#\" \"$@\"";
    let (id, output) = replaced(&["sh", "-c", script, "sh", "a b", "$(id)", "", "-x", "*", "'\"\\"]);
    let printed = printed(&output);
    let (_, told) = printed.split_once("BEGIN\n").unwrap();
    assert_eq!(told, format!("{id}\n<6>\n<a b>\n<$(id)>\n<>\n<-x>\n<*>\n<'\"\\>\n"));
}

#[test]
fn how_the_command_ends_is_how_we_end() {
    assert_eq!(replaced(&["sh", "-c", "exit 7"]).1.status.code(), Some(7));
    assert_eq!(replaced(&["sh", "-c", "kill -TERM $$"]).1.status.signal(), Some(15));
    for (command, code, message) in [
        (&["no-such-command-5f3a"][..], 127, "is not found along PATH"),
        (&["/no/such/file"][..], 127, "is not there"),
        (&["/"][..], 126, "it is a directory"),
        (&["/proc/version"][..], 126, "permission denied"),
    ] {
        let (_, output) = replaced(command);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{told}");
        assert!(told.contains(message), "{told}");
    }
}

#[test]
fn the_command_gets_the_values_and_none_of_our_credentials() {
    let printed = printed(&replaced(&["sh", "-c", "env -0"]).1);
    assert!(printed.contains("INJECTED=a\nb\0"), "{printed:?}");
    assert!(printed.contains("CLAVIGER_ENV=staging\0"), "{printed:?}");
    assert!(!printed.contains("canary-5f3a") && !printed.contains("CLAVIGER_TOKEN"), "{printed:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn the_command_finds_sigpipe_at_its_default_and_no_file_of_ours_open() {
    const SIGPIPE: u64 = 1 << (13 - 1);
    let printed =
        printed(&replaced(&["sh", "-c", "echo; grep SigIgn /proc/self/status; ls -l /proc/self/fd"]).1);
    let ignored = printed.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    assert_eq!(u64::from_str_radix(ignored.trim(), 16).unwrap() & SIGPIPE, 0, "{printed}");
    assert!(printed.contains("/dev/null") && !printed.contains("/proc/version"), "{printed}");
}
