//! The broker's own log: what a line looks like, what it carries, and what it never does.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};

use claviger::proto::v1;
use rustix::process::Signal;
use serde_json::{Map, Value};
use tonic::{Code, Request};

use crate::support::program::{Program, Served, claviger};
use crate::support::secrets;

const CANARY: &str = "canary-Lm4tY9sD2qFx";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// A broker whose log has this format.
fn logging(folder: &Path, format: &str) -> Program {
    let (config, _) = Served::configure(folder, "", "");
    Program::serve(&config, &folder.join("broker.sock"), &[("CLAVIGER_LOG_FORMAT", format)])
}

fn get(name: &str, traceparent: &str) -> Request<v1::GetSecretRequest> {
    let message = v1::GetSecretRequest {
        environment: "development".to_owned(),
        name: name.to_owned(),
        ..Default::default()
    };
    let mut request = Request::new(message);
    request.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
    request
}

/// Every line of a log as JSON; each must be an object that says when, how bad and what.
fn lines(log: &str) -> Vec<Map<String, Value>> {
    let lines: Vec<Map<String, Value>> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    for line in &lines {
        let text = |member: &str| line.get(member).and_then(Value::as_str).unwrap_or_default();
        assert!(text("timestamp").parse::<jiff::Timestamp>().is_ok(), "{line:?}");
        assert!(["TRACE", "DEBUG", "INFO", "WARN", "ERROR"].contains(&text("level")), "{line:?}");
        assert!(!text("message").is_empty(), "{line:?}");
    }
    lines
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_of_json_carries_the_calls_request_and_trace() {
    let folder = tempfile::tempdir().unwrap();
    let mut program = logging(folder.path(), "json");
    assert!(program.put("development", "database", CANARY.as_bytes()).status.success());
    let mut client = secrets(&program.socket).await;
    let good = format!("00-{TRACE}-00f067aa0ba902b7-01");
    let answer = client.get_secret(get("database", &good)).await.unwrap();
    let request_id = answer.metadata().get("x-request-id").unwrap().to_str().unwrap().to_owned();
    let missing = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
    client.get_secret(get("missing", missing)).await.unwrap_err();
    for bad in ["00-00000000000000000000000000000000-00f067aa0ba902b7-01", "00-ABC-1-01", "canary-trace"] {
        client.get_secret(get("database", bad)).await.expect("a bad trace fails no call");
    }
    drop(client);
    assert!(program.signal(Signal::TERM).success());

    let lines = lines(&program.log());
    let calls: Vec<_> = lines.iter().filter(|line| line["message"] == "call ended").collect();
    let traced = |id: &str| {
        let mut found = calls.iter().filter(|line| line.get("trace_id").is_some_and(|found| found == id));
        let line = found.next().unwrap_or_else(|| panic!("no line of trace {id}"));
        assert!(found.next().is_none(), "a call has one line");
        *line
    };
    let line = traced(TRACE);
    assert_eq!(line["request_id"], request_id.as_str());
    assert_eq!(
        (&line["code"], &line["level"], &line["source"]),
        (&"OK".into(), &"DEBUG".into(), &"unix".into())
    );
    assert_eq!(line["method"], "claviger.v1.SecretService/GetSecret");
    assert!(line["elapsed_us"].is_u64());
    let line = traced("0af7651916cd43dd8448eb211c80319c");
    assert_eq!((&line["code"], &line["level"]), (&"NOT_FOUND".into(), &"INFO".into()));
    let of_gets = |line: &&&Map<String, Value>| line["method"] == "claviger.v1.SecretService/GetSecret";
    let untraced = calls.iter().filter(of_gets).filter(|line| !line.contains_key("trace_id")).count();
    assert_eq!(untraced, 3, "a trace that breaks the grammar is none");
    assert!(calls.iter().all(|line| line["request_id"].as_str().is_some_and(|id| id.len() == 36)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_at_its_finest_holds_no_value_in_either_format() {
    for format in ["text", "json"] {
        let folder = tempfile::tempdir().unwrap();
        let mut program = logging(folder.path(), format);
        assert!(program.put("development", "database", CANARY.as_bytes()).status.success());
        let mut client = secrets(&program.socket).await;
        client.get_secret(get("database", "-")).await.unwrap();
        let field = v1::GetSecretRequest { field: "nope".to_owned(), ..get("database", "-").into_inner() };
        client.get_secret(field).await.unwrap_err();
        let mut stranger = get("database", "-");
        let bearer = format!("Bearer {CANARY}");
        stranger.metadata_mut().insert("authorization", bearer.parse().unwrap());
        assert_eq!(client.get_secret(stranger).await.unwrap_err().code(), Code::Unauthenticated);
        drop(client);
        assert!(program.signal(Signal::TERM).success());
        let log = program.log();
        assert!(log.contains("call ended") && log.contains("UNAUTHENTICATED"), "{log}");
        assert!(!log.contains(CANARY), "{log}");
        assert!(!log.contains(&data_encoding::BASE64.encode(CANARY.as_bytes())), "{log}");
        let is_json = log.lines().next().unwrap().starts_with('{');
        assert_eq!(is_json, format == "json", "{log}");
    }
}

#[test]
fn a_format_that_is_none_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (config, _) = Served::configure(folder.path(), "", "");
    let mut command = claviger(["serve".as_ref(), "--config".as_ref(), config.as_os_str()]);
    let output = command.env("CLAVIGER_LOG_FORMAT", "xml").output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{told}");
    assert!(told.contains("CLAVIGER_LOG_FORMAT must be text or json"), "{told}");
    assert!(!folder.path().join("data").exists(), "nothing was made");
}

/// A broker that a test started by itself.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_outlives_whoever_reads_its_log() {
    let folder = tempfile::tempdir().unwrap();
    let (config, _) = Served::configure(folder.path(), "", "");
    let socket = folder.path().join("broker.sock");
    let mut command = claviger(["serve".as_ref(), "--config".as_ref(), config.as_os_str()]);
    command.env("CLAVIGER_LOG", "trace").stdout(Stdio::null()).stderr(Stdio::piped());
    let mut running = Running(command.spawn().unwrap());
    let mut log = BufReader::new(running.0.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("probes and metrics on ") {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0, "the broker ended");
    }
    drop(log);
    let mut client = secrets(&socket).await;
    for _ in 0..10 {
        let status = client.get_secret(get("missing", "-")).await.unwrap_err();
        assert_eq!(status.code(), Code::NotFound, "{status}");
    }
    assert!(running.0.try_wait().unwrap().is_none(), "it runs");
}
