//! What operators see of a broker that runs: probes, checks, figures and gRPC health, from the real binary.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::DirBuilder;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use claviger::proto::v1;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Signal, kill_process};
use serde_json::Value;
use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use tonic::transport::Channel;
use tonic::{Code, Streaming};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::floods::Peer;
use crate::support::program::{Served, http_get};
use crate::support::{channel, secrets};

/// How long anything may take before a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(60);

fn get(name: &str) -> v1::GetSecretRequest {
    v1::GetSecretRequest {
        environment: "development".to_owned(),
        name: name.to_owned(),
        ..Default::default()
    }
}

/// Asks until the answer has this status, and gives its body.
async fn until(admin: &str, path: &str, expected: u16) -> String {
    let asking = async {
        loop {
            let (status, body) = http_get(admin, path).await;
            if status == expected {
                return body;
            }
        }
    };
    timeout(HUNG, asking).await.unwrap_or_else(|_| panic!("{path} never had status {expected}"))
}

/// A watch of the broker's health.
async fn watch(channel: Channel) -> Streaming<HealthCheckResponse> {
    let request = HealthCheckRequest { service: String::new() };
    HealthClient::new(channel).watch(request).await.unwrap().into_inner()
}

/// Waits until the watch tells this.
async fn told(watch: &mut Streaming<HealthCheckResponse>, expected: ServingStatus) {
    let waiting = async {
        while let Some(response) = watch.next().await {
            if response.unwrap().status() == expected {
                return;
            }
        }
        panic!("the watch ended without {expected:?}");
    };
    timeout(HUNG, waiting).await.unwrap_or_else(|_| panic!("the watch never told {expected:?}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_works_says_so_at_each_probe() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path());
    assert_eq!(served.http("/livez").await, (200, "ok".to_owned()));
    assert_eq!(until(&served.admin, "/readyz", 200).await, "ok");
    let health: Value = serde_json::from_str(&until(&served.admin, "/health", 200).await).unwrap();
    assert_eq!(health["status"], "ok");
    let checks = health["checks"].as_array().unwrap();
    let names: BTreeSet<_> = checks.iter().map(|check| check["name"].as_str().unwrap()).collect();
    for name in ["kv", "audit", "policy", "root_key", "store:development", "store:production"] {
        assert!(names.contains(name), "{name}: {names:?}");
    }
    for check in checks {
        assert_eq!(check["status"], "ok", "{check}");
        assert!(check["checked_at"].as_str().unwrap().ends_with('Z'), "{check}");
    }
    let (_, lines) = served.http("/readyz?verbose").await;
    assert!(lines.contains("[+]kv ok\n") && lines.ends_with("readyz check passed\n"), "{lines}");
    assert_eq!(served.http("/secrets").await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_service_has_a_grpc_health() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path());
    let channel = channel(&served.program.socket).await;
    told(&mut watch(channel.clone()).await, ServingStatus::Serving).await;
    let mut health = HealthClient::new(channel);
    for service in
        ["SecretService", "PolicyService", "AuditService", "TokenService", "KeyService", "CacheService"]
    {
        let request = HealthCheckRequest { service: format!("claviger.v1.{service}") };
        let status = health.check(request).await.unwrap().into_inner().status();
        assert_eq!(status, ServingStatus::Serving, "{service}");
    }
    let request = HealthCheckRequest { service: "claviger.v1.NoService".to_owned() };
    assert_eq!(health.check(request).await.unwrap_err().code(), Code::NotFound);
}

/// A small disk of its own; gone with the value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one where the audit log of a broker below `folder` will be.
    fn for_audit(folder: &Path) -> Self {
        let data = folder.join("data");
        DirBuilder::new().mode(0o700).create(&data).unwrap();
        let audit = data.join("audit");
        DirBuilder::new().mode(0o700).create(&audit).unwrap();
        let options = ["-t", "tmpfs", "-o", "size=128k,mode=0700", "tmpfs"];
        let status = Command::new("mount").args(options).arg(&audit).status().unwrap();
        assert!(status.success(), "mounting a tmpfs takes root");
        Self(audit)
    }

    /// Takes every free byte.
    fn fill(&self) -> PathBuf {
        let ballast = self.0.join("ballast");
        let mut file = std::fs::File::create(&ballast).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        ballast
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn b16_a_full_audit_disk_takes_readiness_away_and_space_gives_it_back() {
    let folder = tempfile::tempdir().unwrap();
    let disk = SmallDisk::for_audit(folder.path());
    let served = Served::start(folder.path());
    assert!(served.program.put("development", "database", b"p").status.success());
    let mut watch = watch(channel(&served.program.socket).await).await;
    told(&mut watch, ServingStatus::Serving).await;

    let ballast = disk.fill();
    let mut client = secrets(&served.program.socket).await;
    // What is left of the last page takes some records yet.
    let status = loop {
        if let Err(status) = client.get_secret(get("database")).await {
            break status;
        }
    };
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    told(&mut watch, ServingStatus::NotServing).await;
    let lines = until(&served.admin, "/readyz", 503).await;
    assert!(lines.contains("[-]audit failed\n") && lines.contains("[+]kv ok\n"), "{lines}");
    assert_eq!(served.http("/livez").await.0, 200, "a new process would have no more space");
    let (status, body) = served.http("/health").await;
    let health: Value = serde_json::from_str(&body).unwrap();
    let audit = health["checks"].as_array().unwrap().iter().find(|check| check["name"] == "audit").unwrap();
    assert_eq!((status, &audit["status"]), (503, &"failing".into()), "{body}");
    assert_eq!(audit["detail"], "AUDIT_UNAVAILABLE");
    assert!(!body.contains(folder.path().to_str().unwrap()), "a path: {body}");
    let figures = Figures::parse(&served.http("/metrics").await.1);
    assert!(figures.of("claviger_audit_records_total{result=\"failed\"}") >= 1.0);

    std::fs::remove_file(ballast).unwrap();
    told(&mut watch, ServingStatus::Serving).await;
    until(&served.admin, "/readyz", 200).await;
    client.get_secret(get("database")).await.expect("it resumes without a restart");
}

#[tokio::test(flavor = "multi_thread")]
async fn b30_a_broker_that_was_told_to_stop_says_so_until_the_last_call_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let mut served = Served::with(folder.path(), "drain = \"60s\"", "");
    let mut watch = watch(channel(&served.program.socket).await).await;
    told(&mut watch, ServingStatus::Serving).await;
    let in_flight = Peer::half_a_call(&served.program.socket);
    kill_process(served.program.id(), Signal::TERM).unwrap();
    told(&mut watch, ServingStatus::NotServing).await;
    let end = timeout(HUNG, watch.next()).await.expect("the watch ends");
    assert!(end.is_none_or(|end| end.is_err()), "a watch does not hold the broker up");
    let lines = until(&served.admin, "/readyz", 503).await;
    assert!(lines.contains("[-]shutdown failed\n"), "{lines}");
    assert_eq!(served.http("/livez").await.0, 200);
    let (status, body) = served.http("/health").await;
    assert!(status == 503 && body.contains("\"draining\""), "{body}");
    drop(in_flight);
    // It was told already; this only waits for its end.
    assert!(served.program.signal(Signal::CONT).success());
}

/// Asks until this check fails, and gives when it was made.
async fn failing(admin: &str, name: &str) -> String {
    let asking = async {
        loop {
            let health: Value = serde_json::from_str(&http_get(admin, "/health").await.1).unwrap();
            let checks = health["checks"].as_array().unwrap();
            let check = checks.iter().find(|check| check["name"] == name).unwrap();
            if check["status"] == "failing" {
                return check["checked_at"].as_str().unwrap().to_owned();
            }
        }
    };
    timeout(HUNG, asking).await.unwrap_or_else(|_| panic!("{name} never failed"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_begins_to_fail_and_is_well_again_is_said_once_each() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path());
    until(&served.admin, "/health", 200).await;
    let broken = served.policies.join("zz.cedar");
    std::fs::write(&broken, "@id(\"zz\") permit (principal, acti").unwrap();
    let first = failing(&served.admin, "policy_reload").await;
    let made_again = async { while failing(&served.admin, "policy_reload").await == first {} };
    timeout(HUNG, made_again).await.expect("it is made on its beat");
    std::fs::remove_file(&broken).unwrap();
    served.program.wait_for_log("a health check passes again check=\"policy_reload\"");

    let log = served.program.log();
    let said = |text: &str| -> Vec<String> {
        let of_check = |line: &&str| line.contains(text) && line.contains("check=\"policy_reload\"");
        log.lines().filter(of_check).map(str::to_owned).collect()
    };
    let (fails, passes) = (said("a health check fails"), said("a health check passes again"));
    assert!(fails.len() == 1 && passes.len() == 1, "{log}");
    assert!(fails[0].contains("ERROR") && fails[0].contains("problem="), "{fails:?}");
}

/// Connects to the HTTP door from this address of the machine itself.
fn connect_from(last: u8, door: SocketAddrV4) -> std::io::Result<TcpStream> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, last), 0))?;
    rustix::net::connect(&socket, &door)?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(HUNG))?;
    stream.set_write_timeout(Some(HUNG))?;
    Ok(stream)
}

/// Many who send half a head, wait until they are turned out, and come again. Gone with the value.
struct Crowd {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Crowd {
    const SIZE: u8 = 80;

    /// Gathers one at the door, from 127.0.0.1 to 127.0.0.10, and waits until each has come.
    fn gather(door: SocketAddrV4) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (come, coming) = mpsc::channel();
        let thread = |n: u8| {
            let (stop, come) = (Arc::clone(&stop), come.clone());
            std::thread::spawn(move || {
                Self::visit(1 + n % 10, door);
                let _ = come.send(());
                while !stop.load(Ordering::Relaxed) {
                    Self::visit(1 + n % 10, door);
                }
            })
        };
        let threads = (0..Self::SIZE).map(thread).collect();
        let crowd = Self { stop: Arc::clone(&stop), threads };
        for _ in 0..Self::SIZE {
            coming.recv_timeout(HUNG).expect("they come");
        }
        crowd
    }

    fn visit(last: u8, door: SocketAddrV4) {
        if let Ok(mut stream) = connect_from(last, door) {
            let _ = stream.write_all(b"GET /livez HT");
            let _ = stream.read_to_end(&mut Vec::new());
        }
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[test]
fn a_crowd_of_slow_heads_does_not_keep_a_probe_out() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path());
    let door: SocketAddrV4 = served.admin.strip_prefix("http://").unwrap().parse().unwrap();
    let probe = |last| {
        let Ok(mut stream) = connect_from(last, door) else { return false };
        let _ = stream.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        answer.starts_with(b"HTTP/1.1 200 ")
    };
    let _crowd = Crowd::gather(door);
    for round in 0..40 {
        for last in [200, 1] {
            // A pod is restarted for three in a row; a machine this busy may keep one from sending its head.
            let lives = (0..3).any(|_| probe(last));
            assert!(lives, "round {round}: no answer to 127.0.0.{last}");
        }
    }
}

/// Figures by their series: a name and its labels, as they stand.
struct Figures(BTreeMap<String, f64>);

impl Figures {
    /// Reads OpenMetrics text, and checks what a scraper relies on: one block for each family, with its type; samples
    /// whose names fit it; nothing twice; histograms that only grow and end with infinity; an end.
    fn parse(text: &str) -> Self {
        let body = text.strip_suffix("# EOF\n").expect("it ends as it must");
        let mut figures = BTreeMap::new();
        let mut seen = BTreeSet::new();
        let mut family: Option<(String, String)> = None;
        for line in body.lines() {
            assert!(!line.is_empty() && line.trim() == line, "{line:?}");
            if let Some(comment) = line.strip_prefix("# ") {
                let (word, rest) = comment.split_once(' ').unwrap();
                let (name, said) = rest.split_once(' ').unwrap();
                match word {
                    "HELP" => assert!(seen.insert(name.to_owned()), "{name} comes twice"),
                    "TYPE" => family = Some((name.to_owned(), said.to_owned())),
                    "UNIT" => assert!(name.ends_with(&format!("_{said}")), "{line}"),
                    other => panic!("{other} is no comment of OpenMetrics"),
                }
                continue;
            }
            let (series, value) = line.rsplit_once(' ').unwrap();
            let name = series.split('{').next().unwrap();
            let (of, kind) = family.as_ref().expect("a family comes first");
            let suffix = name.strip_prefix(of.as_str()).unwrap_or_else(|| panic!("{name} is not of {of}"));
            let fits = match kind.as_str() {
                "counter" => suffix == "_total",
                "gauge" => suffix.is_empty(),
                "info" => suffix == "_info",
                "histogram" => ["_bucket", "_sum", "_count"].contains(&suffix),
                other => panic!("{other} is no type that is used here"),
            };
            assert!(fits, "{line} in a {kind}");
            Self::check_labels(series);
            let value = value.parse::<f64>().unwrap_or_else(|_| panic!("{line}"));
            assert!(figures.insert(series.to_owned(), value).is_none(), "{series} comes twice");
        }
        let figures = Self(figures);
        figures.check_histograms(text);
        figures
    }

    fn check_labels(series: &str) {
        let Some((_, labels)) = series.split_once('{') else { return };
        let labels = labels.strip_suffix('}').unwrap_or_else(|| panic!("{series}"));
        for label in labels.split("\",") {
            let (name, value) = label.split_once("=\"").unwrap_or_else(|| panic!("{series}"));
            let word = |text: &str| text.chars().all(|c| c.is_ascii_lowercase() || c == '_');
            assert!(!name.is_empty() && word(name), "{series}");
            assert!(!value.trim_end_matches('"').contains(['"', '\n']), "{series}");
        }
    }

    /// Buckets stand in the order of their bounds, each with those before it.
    fn check_histograms(&self, text: &str) {
        let mut before: Option<(String, f64)> = None;
        for line in text.lines().filter(|line| line.contains("_bucket{")) {
            let (series, count) = line.rsplit_once(' ').unwrap();
            let count: f64 = count.parse().unwrap();
            let (start, rest) = series.split_once("le=\"").unwrap();
            let (bound, end) = rest.split_once('"').unwrap();
            let histogram = format!("{start}{}", end.trim_start_matches(','));
            if let Some((same, least)) = &before
                && *same == histogram
            {
                assert!(count >= *least, "{line}");
            }
            before = (bound != "+Inf").then_some((histogram, count));
            if bound == "+Inf" {
                let of_all = start.replace("_bucket{", "_count{") + end.trim_start_matches(',');
                let of_all = of_all.replace("{}", "");
                assert_eq!(self.of(&of_all), count, "{line}");
            }
        }
        assert!(before.is_none(), "a histogram without infinity");
    }

    fn of(&self, series: &str) -> f64 {
        *self.0.get(series).unwrap_or_else(|| panic!("no {series} in {:#?}", self.0))
    }

    fn has(&self, series: &str) -> bool {
        self.0.contains_key(series)
    }

    /// How many calls of this method ended so.
    fn calls(&self, method: &str, code: &str) -> f64 {
        let series = format!(
            "claviger_requests_total{{method=\"claviger.v1.SecretService/{method}\",code=\"{code}\"}}"
        );
        if self.has(&series) { self.of(&series) } else { 0.0 }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn figures_move_with_what_happens() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path());
    assert!(served.program.put("development", "database", b"p").status.success());
    let mut client = secrets(&served.program.socket).await;
    let before = Figures::parse(&served.http("/metrics").await.1);
    for _ in 0..3 {
        client.get_secret(get("database")).await.unwrap();
    }
    client.get_secret(get("missing")).await.unwrap_err();
    client.get_secret(get("a//b")).await.unwrap_err();
    let (status, text) = served.http("/metrics").await;
    let after = Figures::parse(&text);
    assert_eq!(status, 200);

    for (code, by) in [("OK", 3.0), ("NOT_FOUND", 1.0), ("INVALID_ARGUMENT", 1.0)] {
        let grown = after.calls("GetSecret", code) - before.calls("GetSecret", code);
        assert_eq!(grown, by, "{code}");
    }
    let count = "claviger_request_duration_seconds_count{method=\"claviger.v1.SecretService/GetSecret\"}";
    assert_eq!(after.of(count), 5.0);
    let hits = "claviger_cache_reads_total{environment=\"development\",result=\"hit\"}";
    assert!(after.of(hits) >= before.of(hits) + 2.0);
    let records = "claviger_audit_records_total{result=\"ok\"}";
    assert!(after.of(records) >= before.of(records) + 5.0);
    for series in [
        "claviger_audit_backlog_records",
        "claviger_connections_open",
        "claviger_policy_generation",
        "claviger_policies",
        "claviger_root_keys",
        "claviger_audit_disk_used_ratio",
        "claviger_tasks",
        "process_open_fds",
        "process_resident_memory_bytes",
        "process_start_time_seconds",
        "claviger_rate_limited_total{scope=\"stranger\"}",
        "claviger_policy_reloads_total{result=\"failed\"}",
        "claviger_cache_entries{environment=\"production\"}",
    ] {
        assert!(after.has(series), "{series} in {text}");
    }
    assert!(after.of("claviger_connections_open") >= 1.0);
    assert!(after.of("claviger_policies") >= 1.0 && after.of("claviger_root_keys") >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_at_the_operators_door_names_a_secret_or_a_caller() {
    const NAME: &str = "canary/name-Wq8xT3";
    const VALUE: &str = "canary-value-Jh6zP0vR";
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path());
    assert!(served.program.put("development", NAME, VALUE.as_bytes()).status.success());
    let mut client = secrets(&served.program.socket).await;
    client.get_secret(get(NAME)).await.unwrap();
    client.get_secret(get(&format!("{NAME}-missing"))).await.unwrap_err();
    client.get_secret(get("canary//")).await.unwrap_err();
    for path in ["/livez?verbose", "/readyz?verbose", "/health", "/metrics", "/canary"] {
        let (_, body) = served.http(path).await;
        for secret in ["canary", "Wq8xT3", VALUE, "tester"] {
            assert!(!body.contains(secret), "{secret} at {path}: {body}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_callers_make_up_adds_no_series() {
    let folder = tempfile::tempdir().unwrap();
    let served = Served::start(folder.path());
    let channel = channel(&served.program.socket).await;
    let before = Figures::parse(&served.http("/metrics").await.1)
        .of("claviger_requests_total{method=\"other\",code=\"OK\"}");
    assert_eq!(before, 0.0);
    for n in 0..20 {
        let path = format!("/made.up{n}.Service/Method{n}").parse().unwrap();
        let mut grpc = tonic::client::Grpc::new(channel.clone());
        grpc.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<v1::GetSecretRequest, v1::GetSecretResponse>::default();
        let status = grpc.unary(tonic::Request::new(get("x")), path, codec).await.unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented);
    }
    let (_, text) = served.http("/metrics").await;
    let after = Figures::parse(&text);
    assert_eq!(after.of("claviger_requests_total{method=\"other\",code=\"UNIMPLEMENTED\"}"), 20.0);
    assert!(!text.contains("made"), "{text}");
}
