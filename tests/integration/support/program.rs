//! The real binary, as a user starts it.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long anything may take before a test is called hung. Never what a test waits for.
const HUNG: Duration = Duration::from_secs(60);

/// A command of the binary with an environment that holds nothing but what a test says.
pub fn claviger<I: AsRef<OsStr>>(arguments: impl IntoIterator<Item = I>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_claviger"));
    command.args(arguments).env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.env("HOME", "/nonexistent").current_dir("/").stdin(Stdio::null());
    command
}

/// A broker that runs.
pub struct Program {
    child: Child,
    log: Arc<Log>,
    reader: Option<JoinHandle<()>>,
    /// The socket that it listens on.
    pub socket: PathBuf,
}

#[derive(Default)]
struct Log {
    lines: Mutex<(Vec<String>, bool)>,
    more: Condvar,
}

impl Program {
    /// Starts `claviger dev` on `folder`.
    pub fn dev(folder: &Path) -> Self {
        let socket = folder.join("dev.sock");
        let data = folder.join("data");
        let arguments =
            ["dev".as_ref(), "--data".as_ref(), data.as_os_str(), "--socket".as_ref(), socket.as_os_str()];
        Self::start(claviger(arguments), socket.clone())
    }

    /// Starts `claviger serve` with this configuration, which listens on `socket`.
    pub fn serve(config: &Path, socket: &Path, variables: &[(&str, &str)]) -> Self {
        let mut command = claviger(["serve".as_ref(), "--config".as_ref(), config.as_os_str()]);
        command.envs(variables.iter().copied());
        Self::start(command, socket.to_owned())
    }

    /// Starts `command` and waits until it says that it listens.
    pub fn start(mut command: Command, socket: PathBuf) -> Self {
        command.env("CLAVIGER_LOG", "trace").stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary starts");
        let log = Arc::new(Log::default());
        let stderr = BufReader::new(child.stderr.take().expect("a pipe"));
        let reader = std::thread::spawn({
            let log = Arc::clone(&log);
            move || {
                for line in stderr.lines().map_while(Result::ok) {
                    log.lines.lock().unwrap().0.push(line);
                    log.more.notify_all();
                }
                log.lines.lock().unwrap().1 = true;
                log.more.notify_all();
            }
        });
        let program = Self { child, log, reader: Some(reader), socket };
        program.wait_for_log("listening on");
        program
    }

    /// Waits until a line of the log holds `text`.
    pub fn wait_for_log(&self, text: &str) {
        let lines = self.log.lines.lock().unwrap();
        let seen = |lines: &(Vec<String>, bool)| lines.1 || lines.0.iter().any(|line| line.contains(text));
        let (lines, wait) = self.log.more.wait_timeout_while(lines, HUNG, |lines| !seen(lines)).unwrap();
        assert!(!wait.timed_out(), "no `{text}` in the log:\n{}", lines.0.join("\n"));
        let found = lines.0.iter().any(|line| line.contains(text));
        assert!(found, "the broker ended without `{text}`:\n{}", lines.0.join("\n"));
    }

    /// All that it has written to standard error.
    pub fn log(&self) -> String {
        self.log.lines.lock().unwrap().0.join("\n")
    }

    /// The process's id.
    pub fn id(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// A command against this broker.
    pub fn command<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Command {
        let mut command = claviger(arguments);
        command.env("CLAVIGER_ADDR", format!("unix://{}", self.socket.display()));
        command
    }

    /// Runs a command against this broker to its end.
    pub fn run<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Output {
        self.command(arguments).output().expect("the binary runs")
    }

    /// Runs a command that must succeed, and gives its standard output.
    pub fn ok<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    /// Runs a command that must fail with `code`, and gives its standard error.
    pub fn fails<I: AsRef<OsStr>>(&self, code: i32, arguments: impl IntoIterator<Item = I>) -> String {
        let output = self.run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        stderr
    }

    /// Writes a secret's value as a user does: through standard input.
    pub fn put(&self, environment: &str, name: &str, value: &[u8]) -> Output {
        with_input(self.command(["put", "-e", environment, name]), value)
    }

    /// Ends the process with a signal and gives how it ended.
    pub fn signal(&mut self, signal: rustix::process::Signal) -> ExitStatus {
        rustix::process::kill_process(self.id(), signal).expect("the process is there");
        let lines = self.log.lines.lock().unwrap();
        let (lines, wait) = self.log.more.wait_timeout_while(lines, HUNG, |lines| !lines.1).unwrap();
        assert!(!wait.timed_out(), "the broker lives on after {signal:?}:\n{}", lines.0.join("\n"));
        drop(lines);
        let status = self.child.wait().expect("it ends");
        if let Some(reader) = self.reader.take() {
            reader.join().expect("its log is read to the end");
        }
        status
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command with `input` on its standard input.
pub fn with_input(mut command: Command, input: &[u8]) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    child.stdin.take().expect("a pipe").write_all(input).expect("it reads its input");
    child.wait_with_output().expect("it ends")
}

/// A broker as `claviger serve` runs it, on the embedded store: root is an administrator, policies lie in a folder, and
/// the HTTP door is open.
pub struct Served {
    /// The broker.
    pub program: Program,
    /// `http://127.0.0.1:PORT` of the HTTP door.
    pub admin: String,
    /// The policies.
    pub policies: PathBuf,
}

impl Served {
    /// Starts one below `folder`.
    pub fn start(folder: &Path) -> Self {
        Self::with(folder, "", "")
    }

    /// The same, with more keys in `[listen]`, and more tables.
    pub fn with(folder: &Path, listen: &str, tables: &str) -> Self {
        let (config, policies) = Self::configure(folder, listen, tables);
        let program = Program::serve(&config, &folder.join("broker.sock"), &[]);
        program.wait_for_log("probes and metrics on ");
        let log = program.log();
        let admin = log.lines().find_map(|line| line.split_once("probes and metrics on ")).unwrap().1;
        let admin = admin.trim().to_owned();
        Self { program, admin, policies }
    }

    /// Writes the configuration and the policies.
    pub fn configure(folder: &Path, listen: &str, tables: &str) -> (PathBuf, PathBuf) {
        let policies = folder.join("policies");
        std::fs::create_dir_all(&policies).unwrap();
        for (file, text) in claviger::policy::SHIPPED {
            std::fs::write(policies.join(file), text).unwrap();
        }
        let uid = rustix::process::getuid().as_raw();
        let place = folder.display();
        let text = format!(
            r#"
[listen]
unix = "{place}/broker.sock"
admin = "127.0.0.1:0"
{listen}
[kv]
directory = "{place}/data"
[root_key]
file = "{place}/root.key"
[policy]
directory = "{place}/policies"
[[identity.peer_credentials.callers]]
uid = {uid}
kind = "user"
id = "tester"
groups = ["administrators", "team"]
[environments.development]
[environments.production]
protected = true
{tables}
"#
        );
        let config = folder.join("broker.toml");
        std::fs::write(&config, text).unwrap();
        (config, policies)
    }

    /// What the HTTP door answers to a GET: the status and the body.
    pub async fn http(&self, path: &str) -> (u16, String) {
        http_get(&self.admin, path).await
    }
}

/// A GET over HTTP/1.1, in as few words as it takes.
pub async fn http_get(address: &str, path: &str) -> (u16, String) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let host = address.strip_prefix("http://").expect("an http address");
    let mut stream = tokio::net::TcpStream::connect(host).await.expect("the door is open");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("it listens");
    let mut answer = String::new();
    tokio::time::timeout(HUNG, stream.read_to_string(&mut answer)).await.expect("it answers").expect("text");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split_whitespace().nth(1).and_then(|code| code.parse().ok()).expect("a status");
    (status, body.to_owned())
}
