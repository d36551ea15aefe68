//! `tests/python/oracle.py`, started and asked.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde::Deserialize;

use super::HUNG;
use super::stage::{ENVIRONMENT, NAME, Stage};
use crate::support::moto::python;

/// A program that shares no code with the broker, and logs in all the time.
pub(super) struct Oracle {
    child: Child,
    orders: ChildStdin,
    lines: mpsc::Receiver<String>,
}

/// What it saw.
#[derive(Debug, Deserialize)]
pub(super) struct Account {
    /// Logins.
    pub(super) logins: u64,
    /// Logins that failed with a value that had just been read.
    pub(super) failed: u64,
    /// The same, with one that was held for longer than anybody may.
    pub(super) late: u64,
    /// The server could not be asked.
    pub(super) unreachable: u64,
    /// The broker could not be asked, or its store.
    pub(super) reads_failed: u64,
    /// The broker refused.
    pub(super) refused: u64,
    /// The versions that were read, in order.
    pub(super) versions: Vec<String>,
    /// Between two logins, in milliseconds.
    pub(super) longest_gap: u64,
    /// Values that changed, pairs that were mixed, versions that came back.
    wrong: Vec<String>,
    /// The first few of what is counted above.
    described: serde_json::Value,
}

impl Oracle {
    /// Starts one that logs in every 50 ms, and waits for its first login.
    pub(super) fn watch(stage: &Stage) -> Self {
        Self::every(Duration::from_millis(50), stage)
    }

    /// The same at another pace.
    pub(super) fn every(pace: Duration, stage: &Stage) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/oracle.py");
        let pair = &stage.pair;
        let mut command = Command::new(python());
        command.arg("-B").arg(script);
        for (flag, value) in [
            ("--socket", stage.socket().display().to_string()),
            ("--environment", ENVIRONMENT.to_owned()),
            ("--name", NAME.to_owned()),
            ("--host", "127.0.0.1".to_owned()),
            ("--port", pair.port.to_string()),
            ("--dbname", pair.database.clone()),
            ("--table", "shop.proof".to_owned()),
            ("--users", pair.users.join(",")),
            ("--every", pace.as_millis().to_string()),
            ("--grace", stage.gap.as_millis().to_string()),
            ("--history", stage.folder().join("oracle.jsonl").display().to_string()),
        ] {
            command.arg(flag).arg(value);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).current_dir(stage.folder());
        let mut child = command.spawn().unwrap_or_else(|error| {
            panic!("{}: {error}; `bash tests/run` makes it", python().display());
        });
        let orders = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (tell, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if tell.send(line).is_err() {
                    return;
                }
            }
        });
        let oracle = Self { child, orders, lines };
        oracle.hear("ready");
        oracle
    }

    /// Waits until it has logged in with this version.
    pub(super) fn saw(&mut self, version: &str) {
        self.order(&format!("seen {version}"));
        self.hear(&format!("seen {version}"));
    }

    /// Waits until it has logged in `times` more.
    pub(super) fn logs_in(&mut self, times: u32) {
        self.order(&format!("more {times}"));
        self.hear(&format!("more {times}"));
    }

    /// Says that the next change may lead back to a version from before.
    pub(super) fn may_go_back(&mut self) {
        self.order("back");
    }

    /// Ends it.
    pub(super) fn stop(mut self) -> Account {
        self.order("stop");
        let line = self.lines.recv_timeout(HUNG).expect("its account");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    fn order(&mut self, order: &str) {
        writeln!(self.orders, "{order}").expect("the oracle lives");
    }

    fn hear(&self, expected: &str) {
        let line =
            self.lines.recv_timeout(HUNG).unwrap_or_else(|_| panic!("no `{expected}` from the oracle"));
        assert_eq!(line, expected);
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Account {
    /// Nobody was locked out, not for one login; the database was always there.
    pub(super) fn assert_clean(&self) {
        self.assert_no_lockout();
        assert_eq!(self.unreachable, 0, "{}", self.described);
    }

    /// Nobody was locked out, not for one login that the database got to see.
    pub(super) fn assert_no_lockout(&self) {
        assert_eq!((self.failed, self.refused), (0, 0), "{}", self.described);
        assert!(self.wrong.is_empty(), "{:?}", self.wrong);
        assert!(self.logins > 0, "{}", self.described);
        // Of a machine that is busy, some logins come later than anybody may hold a value. Where they are many, nothing
        // is proven.
        assert!(self.late * 20 <= self.logins, "{} of {}: {}", self.late, self.logins, self.described);
    }
}
