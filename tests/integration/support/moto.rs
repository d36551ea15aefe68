//! AWS Secrets Manager for tests: moto behind `tests/moto/strict_moto.py`, and a proxy that does what AWS does on a
//! bad day.
//!
//! ```text
//! store ──▶ FaultProxy ──▶ strict_moto.py (a process of its own, one per test binary)
//!             throttles, denies, hangs, cuts, counts
//! ```

use std::collections::BTreeMap;
use std::future::pending;
use std::io::{self, BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use aws_credential_types::Credentials;
use aws_sdk_secretsmanager::config::Region;
use claviger::clock::{SharedClock, SystemClock};
use claviger::environment::AwsSettings;
use claviger::secret::EnvironmentName;
use claviger::store::Store;
use claviger::store::aws::{Aws, Bounds};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// Where everything is.
pub const REGION: &str = "eu-central-1";

/// The server. One serves all tests of a process: give each test an environment of its own.
pub struct Moto {
    endpoint: String,
    // The launcher ends when this is closed, which the kernel does for a test binary that ends in any way.
    _lifeline: ChildStdin,
    _process: Child,
}

impl Moto {
    /// The server of this process, started by whoever asks first.
    pub async fn start() -> &'static Self {
        static SHARED: OnceLock<Moto> = OnceLock::new();
        tokio::task::spawn_blocking(|| SHARED.get_or_init(Self::launch)).await.unwrap()
    }

    /// Where it listens: `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// A store for one environment.
    pub async fn store(&self, environment: &EnvironmentName, clock: SharedClock) -> Arc<dyn Store> {
        store_at(&self.endpoint, environment, &quick(), clock).await
    }

    /// The SDK's own client, for what a store does not do.
    pub fn client(&self) -> aws_sdk_secretsmanager::Client {
        let http = aws_smithy_http_client::Builder::new()
            .tls_provider(aws_smithy_http_client::tls::Provider::Rustls(
                aws_smithy_http_client::tls::rustls_provider::CryptoMode::Ring,
            ))
            .build_https();
        let config = aws_sdk_secretsmanager::Config::builder()
            .behavior_version_latest()
            .http_client(http)
            .region(Region::new(REGION))
            .credentials_provider(credentials())
            .endpoint_url(&self.endpoint)
            .build();
        aws_sdk_secretsmanager::Client::from_conf(config)
    }

    fn launch() -> Self {
        let python = python();
        let launcher = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/moto/strict_moto.py");
        let mut process = Command::new(&python)
            .arg(launcher)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}; run `bash tests/run` first", python.display()));
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let endpoint = line.trim().strip_prefix("listening on ");
        let endpoint = endpoint.unwrap_or_else(|| panic!("moto did not start; run `bash tests/run` first"));
        Self { endpoint: endpoint.to_owned(), _lifeline: process.stdin.take().unwrap(), _process: process }
    }
}

/// `$CLAVIGER_TEST_PYTHON`, or that of the virtual environment that `tests/run` makes.
pub fn python() -> PathBuf {
    if let Some(python) = std::env::var_os("CLAVIGER_TEST_PYTHON") {
        return python.into();
    }
    let made = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/test-venv");
    std::env::var_os("CLAVIGER_TEST_VENV").map_or(made, PathBuf::from).join("bin/python")
}

/// The bounds that the program has, with pauses that no test has to wait for.
pub fn quick() -> Bounds {
    Bounds { backoff: Duration::from_millis(1), ..Bounds::default() }
}

/// As [`quick`], without a second attempt: what is lost stays lost until the test tries again.
pub fn once() -> Bounds {
    Bounds { attempts: 1, ..quick() }
}

/// A store that asks `endpoint`, whoever is there.
pub async fn store_at(
    endpoint: &str,
    environment: &EnvironmentName,
    bounds: &Bounds,
    clock: SharedClock,
) -> Arc<Aws> {
    let settings = AwsSettings {
        region: Some(REGION.to_owned()),
        endpoint: Some(endpoint.to_owned()),
        ..AwsSettings::default()
    };
    let store = Aws::with_credentials(environment.clone(), &settings, credentials(), bounds, clock).await;
    Arc::new(store.unwrap())
}

/// An environment that no other test has.
pub fn fresh_environment() -> EnvironmentName {
    EnvironmentName::parse(&format!("t-{}", uuid::Uuid::new_v4())).unwrap()
}

/// Credentials of moto's own account.
pub fn credentials() -> Credentials {
    Credentials::new("test", "test", None, None, "test")
}

/// What the proxy does with a request.
#[derive(Debug, Clone)]
pub enum Mode {
    /// Hands it on, and the answer back.
    Pass,
    /// `ThrottlingException`, status 400.
    Throttle,
    /// `AccessDeniedException`, status 400.
    Deny,
    /// Status 503, and no body that says more.
    Unavailable,
    /// Takes it and never answers.
    Hang,
    /// Hands it on and drops the answer: it is done, and nobody knows.
    CutAfterRequest,
    /// Answers itself.
    Answer(u16, String),
}

/// What happens to which requests.
#[derive(Debug)]
struct Plan {
    mode: Mode,
    /// Only to this operation; `None`: to every one.
    operation: Option<&'static str>,
    /// Only so often; `None`: until further notice.
    times: Option<usize>,
}

#[derive(Debug)]
struct Faults {
    plan: Mutex<Plan>,
    calls: Mutex<BTreeMap<String, usize>>,
    upstream: String,
}

/// A proxy in front of a server, which breaks what it is told to break.
pub struct FaultProxy {
    endpoint: String,
    faults: Arc<Faults>,
    task: JoinHandle<()>,
}

impl FaultProxy {
    /// A proxy that passes everything to `upstream` (`http://HOST:PORT`) until it is told otherwise.
    pub async fn start(upstream: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let faults = Arc::new(Faults {
            plan: Mutex::new(Plan { mode: Mode::Pass, operation: None, times: None }),
            calls: Mutex::default(),
            upstream: upstream.strip_prefix("http://").unwrap().to_owned(),
        });
        let task = tokio::spawn(accept(listener, Arc::clone(&faults)));
        Self { endpoint, faults, task }
    }

    /// Where it listens.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// A store that goes through this proxy.
    pub async fn store(&self, environment: &EnvironmentName, bounds: &Bounds) -> Arc<Aws> {
        store_at(&self.endpoint, environment, bounds, SystemClock::shared()).await
    }

    /// Does this to every request from now on.
    pub fn set(&self, mode: Mode) {
        self.plan(Plan { mode, operation: None, times: None });
    }

    /// Does this to every request for `operation` from now on, and passes the others.
    pub fn set_for(&self, operation: &'static str, mode: Mode) {
        self.plan(Plan { mode, operation: Some(operation), times: None });
    }

    /// Does this to the next `times` requests for `operation`, and passes the others.
    pub fn next(&self, operation: &'static str, times: usize, mode: Mode) {
        self.plan(Plan { mode, operation: Some(operation), times: Some(times) });
    }

    /// How many requests for `operation` came in since the last [`forget`](Self::forget), whatever was done to them.
    /// Requests to STS name theirs in no header and count under "".
    pub fn calls(&self, operation: &str) -> usize {
        self.faults.calls.lock().unwrap().get(operation).copied().unwrap_or(0)
    }

    /// Counts from zero again.
    pub fn forget(&self) {
        self.faults.calls.lock().unwrap().clear();
    }

    fn plan(&self, plan: Plan) {
        *self.faults.plan.lock().unwrap() = plan;
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Faults {
    fn count(&self, operation: &str) {
        *self.calls.lock().unwrap().entry(operation.to_owned()).or_default() += 1;
    }

    fn for_request(&self, operation: &str) -> Mode {
        let mut plan = self.plan.lock().unwrap();
        let meant = plan.operation.is_none_or(|only| only == operation) && plan.times != Some(0);
        if !meant {
            return Mode::Pass;
        }
        plan.times = plan.times.map(|times| times - 1);
        plan.mode.clone()
    }
}

async fn accept(listener: TcpListener, faults: Arc<Faults>) {
    // Dropped with the task, and every connection with it.
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        connections.spawn(serve(client, Arc::clone(&faults)));
    }
}

/// One request a connection, as moto has it.
async fn serve(mut client: TcpStream, faults: Arc<Faults>) -> io::Result<()> {
    let Some(request) = Request::read(&mut client).await? else { return Ok(()) };
    faults.count(&request.operation);
    let refusal =
        |status, code: &str| reply(status, &format!(r#"{{"__type":"{code}","Message":"by the proxy"}}"#));
    let answer = match faults.for_request(&request.operation) {
        Mode::Pass => forward(&faults.upstream, &request.bytes).await?,
        Mode::Throttle => refusal(400, "ThrottlingException"),
        Mode::Deny => refusal(400, "AccessDeniedException"),
        Mode::Unavailable => reply(503, ""),
        Mode::Hang => pending().await,
        Mode::CutAfterRequest => {
            forward(&faults.upstream, &request.bytes).await?;
            return Ok(());
        }
        Mode::Answer(status, body) => reply(status, &body),
    };
    client.write_all(&answer).await?;
    client.shutdown().await
}

async fn forward(upstream: &str, request: &[u8]) -> io::Result<Vec<u8>> {
    let mut server = TcpStream::connect(upstream).await?;
    server.write_all(request).await?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).await?;
    Ok(answer)
}

fn reply(status: u16, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "HTTP/1.1 {status} -\r\ncontent-type: application/x-amz-json-1.1\r\ncontent-length: {length}\r\n\
         connection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

struct Request {
    /// What follows the dot in `X-Amz-Target: secretsmanager.GetSecretValue`.
    operation: String,
    bytes: Vec<u8>,
}

impl Request {
    /// `None` where the client closed the connection without asking anything.
    async fn read(client: &mut TcpStream) -> io::Result<Option<Self>> {
        const END_OF_HEAD: &[u8] = b"\r\n\r\n";
        let mut bytes = Vec::new();
        let head = loop {
            if let Some(end) = bytes.windows(END_OF_HEAD.len()).position(|window| window == END_OF_HEAD) {
                break end + END_OF_HEAD.len();
            }
            if client.read_buf(&mut bytes).await? == 0 {
                return Ok(None);
            }
        };
        let text = String::from_utf8_lossy(&bytes[..head]).into_owned();
        let length = header(&text, "content-length").map_or(0, |length| length.parse().unwrap());
        while bytes.len() < head + length {
            if client.read_buf(&mut bytes).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let target = header(&text, "x-amz-target").unwrap_or_default();
        Ok(Some(Self { operation: target.rsplit('.').next().unwrap_or_default().to_owned(), bytes }))
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(found, _)| found.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim())
}
