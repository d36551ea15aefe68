//! A real PostgreSQL in a temporary folder, on a port of its own.
//!
//! ```text
//! folder (postgres', 0700) ─┬─ data/   the cluster, or a copy of another one's that follows it
//!                           ├─ log     what the server says
//!                           └─ .s.PGSQL.PORT   where the superuser is let in without a password
//! ```
//!
//! The server does not run as root: where the tests do, it runs as the user `postgres` of the Debian package.

use std::fmt::Write as _;
use std::fs::{File, Permissions};
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::certificates::Issued;

/// How long anything may take before a test is called hung.
const HUNG: Duration = Duration::from_secs(60);
const USER: &str = "postgres";
/// Another process may take the port between its choice and its use.
const ATTEMPTS: usize = 5;

/// How a server is.
#[derive(Default)]
pub struct Options<'a> {
    /// Lines of `pg_hba.conf` before the last, which demands SCRAM of everyone from everywhere.
    pub access: &'a [&'a str],
    /// Settings, beyond those that make it fast.
    pub settings: &'a [(&'a str, &'a str)],
    /// The certificate to show; without it the server takes no TLS.
    pub certificate: Option<&'a Issued>,
}

/// A server that runs.
pub struct Postgres {
    folder: tempfile::TempDir,
    port: u16,
    arguments: Vec<String>,
    process: Option<Child>,
}

impl Postgres {
    /// A fresh cluster.
    pub fn start() -> Self {
        Self::with(&Options::default())
    }

    /// A fresh cluster that is like this.
    pub fn with(options: &Options<'_>) -> Self {
        let folder = folder();
        let data = folder.path().join("data");
        let mut initdb = program("initdb");
        initdb.args(["-U", USER, "-A", "scram-sha-256", "-E", "UTF8", "--locale=C", "--no-sync", "-D"]);
        let password = folder.path().join("password");
        own(&password, "unused");
        initdb.arg(&data).arg("--pwfile").arg(&password);
        done(&mut initdb);
        let mut arguments = Vec::new();
        for (name, value) in options.settings {
            arguments.extend(["-c".to_owned(), format!("{name}={value}")]);
        }
        if let Some(issued) = options.certificate {
            let (certificate, key) = (folder.path().join("server.crt"), folder.path().join("server.key"));
            own(&certificate, &issued.certificate);
            own(&key, &issued.key);
            for (name, file) in [("ssl_cert_file", certificate), ("ssl_key_file", key)] {
                arguments.extend(["-c".to_owned(), format!("{name}={}", file.display())]);
            }
            arguments.extend(["-c".to_owned(), "ssl=on".to_owned()]);
        }
        own(&data.join("pg_hba.conf"), &access(options.access));
        Self::launch(folder, arguments)
    }

    /// A standby that follows this server.
    pub fn standby(&self) -> Self {
        let folder = folder();
        let mut backup = program("pg_basebackup");
        backup.args(["-U", USER, "-R", "-X", "stream", "--checkpoint=fast", "--no-sync", "-p"]);
        backup.arg(self.port.to_string()).arg("-h").arg(self.folder.path());
        backup.arg("-D").arg(folder.path().join("data"));
        done(&mut backup);
        Self::launch(folder, self.arguments.clone())
    }

    /// Where it listens: `127.0.0.1:PORT`.
    pub fn place(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Runs statements as the superuser in the database `postgres`; gives the rows, unaligned.
    pub fn sql(&self, sql: &str) -> String {
        self.sql_in(USER, sql)
    }

    /// The same in another database.
    pub fn sql_in(&self, database: &str, sql: &str) -> String {
        let mut psql = self.psql(database);
        psql.args(["-h", &self.folder.path().display().to_string(), "-U", USER]);
        let output = fed(psql, sql);
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    /// A session that stays open until the child is ended.
    pub fn session(&self, database: &str, user: &str, password: &str) -> Session {
        let mut psql = self.psql(database);
        psql.args(["-h", "127.0.0.1", "-U", user]).env("PGPASSWORD", password).env("PGSSLMODE", "prefer");
        psql.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = psql.spawn().unwrap();
        let sessions = format!(
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE usename = '{}'",
            user.replace('\'', "''")
        );
        self.wait_for(&sessions);
        Session { child }
    }

    /// Waits until a query gives `t`.
    pub fn wait_for(&self, sql: &str) {
        poll(sql, || self.sql(sql) == "t");
    }

    /// Writes `pg_hba.conf` anew: these lines, and then SCRAM for everyone. It counts from the next connection on.
    pub fn access(&self, lines: &[&str]) {
        own(&self.folder.path().join("data/pg_hba.conf"), &access(lines));
        let before = self.sql("SELECT pg_conf_load_time()");
        self.sql("SELECT pg_reload_conf()");
        self.wait_for(&format!("SELECT pg_conf_load_time() > '{before}'"));
    }

    /// All that it has written to its log.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.folder.path().join("log")).unwrap()).into_owned()
    }

    /// Ends it: `Signal::INT` as `pg_ctl stop -m fast`, `Signal::QUIT` as `-m immediate`, a crash.
    pub fn stop(&mut self, how: Signal) {
        if let Some(mut process) = self.process.take() {
            let id = Pid::from_child(&process);
            let _ = kill_process(id, Signal::CONT);
            let _ = kill_process(id, how);
            process.wait().unwrap();
        }
    }

    /// Starts it again at the same port.
    pub fn restart(&mut self) {
        self.stop(Signal::INT);
        let mut process = self.spawn();
        assert!(self.is_up(&mut process), "it does not come back:\n{}", self.log());
        self.process = Some(process);
    }

    /// It takes connections, and says nothing.
    pub fn freeze(&self) {
        kill_process(self.id(), Signal::STOP).unwrap();
    }

    /// It goes on where it was.
    pub fn thaw(&self) {
        kill_process(self.id(), Signal::CONT).unwrap();
    }

    fn id(&self) -> Pid {
        Pid::from_child(self.process.as_ref().expect("it runs"))
    }

    fn launch(folder: tempfile::TempDir, arguments: Vec<String>) -> Self {
        let mut server = Self { folder, port: 0, arguments, process: None };
        for _ in 0..ATTEMPTS {
            server.port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let mut process = server.spawn();
            if server.is_up(&mut process) {
                server.process = Some(process);
                return server;
            }
        }
        panic!("PostgreSQL does not start:\n{}", server.log());
    }

    fn spawn(&self) -> Child {
        let folder = self.folder.path();
        let log = File::options().create(true).append(true).open(folder.join("log")).unwrap();
        let mut server = program("postgres");
        server.arg("-D").arg(folder.join("data")).arg("-k").arg(folder).args(["-h", "127.0.0.1", "-p"]);
        server.arg(self.port.to_string()).args(["-c", "fsync=off", "-c", "full_page_writes=off"]);
        server.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        server.spawn().unwrap()
    }

    /// Whether it answers, and not rather ends.
    fn is_up(&self, process: &mut Child) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < HUNG {
            if process.try_wait().unwrap().is_some() {
                return false;
            }
            let mut psql = self.psql(USER);
            psql.args(["-h", &self.folder.path().display().to_string(), "-U", USER, "-c", "SELECT 1"]);
            if psql.output().unwrap().status.success() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = process.kill();
        let _ = process.wait();
        false
    }

    fn psql(&self, database: &str) -> Command {
        let mut psql = Command::new(binary("psql"));
        psql.args(["-X", "-At", "-q", "-v", "ON_ERROR_STOP=1", "-d", database, "-p", &self.port.to_string()]);
        psql.env("PGCONNECT_TIMEOUT", "10").stdin(Stdio::null());
        psql
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop(Signal::QUIT);
    }
}

/// An open session; it ends with this.
pub struct Session {
    child: Child,
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks until it is so.
pub fn poll(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < HUNG, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn access(lines: &[&str]) -> String {
    let mut access = "local all postgres trust\nlocal replication postgres trust\n".to_owned();
    for line in lines {
        writeln!(access, "{line}").unwrap();
    }
    access + "host all all all scram-sha-256\n"
}

/// Where the package has its programs.
fn binary(name: &str) -> PathBuf {
    if let Some(folder) = std::env::var_os("CLAVIGER_TEST_POSTGRESQL") {
        return PathBuf::from(folder).join(name);
    }
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<_> = versions.map(|version| version.path().join("bin").join(name)).collect();
    found.retain(|path| path.exists());
    found.sort();
    found.pop().unwrap_or_else(|| panic!("no PostgreSQL: install the Debian package `postgresql`"))
}

/// A program of the server, as the user that it runs as.
fn program(name: &str) -> Command {
    if !rustix::process::geteuid().is_root() {
        let mut command = Command::new(binary(name));
        command.current_dir("/");
        return command;
    }
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={USER}")).arg(format!("--regid={USER}")).args(["--init-groups", "--"]);
    command.arg(binary(name)).current_dir("/");
    command
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("claviger-pg-").tempdir().unwrap();
    given(folder.path());
    folder
}

/// Writes a file that is the server's own.
fn own(path: &Path, content: &str) {
    std::fs::write(path, content).unwrap();
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    given(path);
}

fn given(path: &Path) {
    if rustix::process::geteuid().is_root() {
        let users = std::fs::read_to_string("/etc/passwd").unwrap();
        let entry = users.lines().find(|line| line.split(':').next() == Some(USER)).expect("a user postgres");
        let ids: Vec<u32> = entry.split(':').skip(2).take(2).map(|id| id.parse().unwrap()).collect();
        chown(path, Some(ids[0]), Some(ids[1])).unwrap();
    }
}

fn done(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn fed(mut command: Command, input: &str) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}
