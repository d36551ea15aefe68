//! The program itself, built as the benchmark is: what is started, and how it ends.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::process::resident_kib;

/// Where it is.
pub(crate) const CLAVIGER: &str = env!("CARGO_BIN_EXE_claviger");

/// How long a broker that was started may take to listen, or one that was told to end to do so.
const HUNG: Duration = Duration::from_secs(120);

/// A command with an environment of nothing but what it takes to find others, so that no setting of who measures
/// (a token, an address, cargo's folders of libraries) has a say.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// A broker that was started as users do it. Killed when it goes.
pub(crate) struct Program {
    process: Child,
}

impl Program {
    /// Starts it, and waits until it says that it listens.
    pub(crate) fn start(command: &mut Command) -> Self {
        let process = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let mut program = Self { process };
        let mut stderr = BufReader::new(program.process.stderr.take().expect("a pipe"));
        let mut said = String::new();
        while !said.contains("listening on") {
            let read = stderr.read_line(&mut said).expect("text");
            assert!(read > 0, "{command:?} ended before it listened: {said}");
        }
        // Read on, so that nothing it says makes it wait.
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
        program
    }

    /// How much memory it has in use once it does nothing any more: when that has stood still for half a second, or what
    /// it is after some seconds in which it did not.
    pub(crate) fn settled_kib(&self) -> u64 {
        const STILL: usize = 5;
        const LONGEST: Duration = Duration::from_secs(5);
        const LOOK: Duration = Duration::from_millis(100);
        let (begun, mut last, mut still) = (Instant::now(), 0, 0);
        while still < STILL && begun.elapsed() < LONGEST {
            std::thread::sleep(LOOK);
            let now = resident_kib(self.process.id());
            still = if now == last { still + 1 } else { 0 };
            last = now;
        }
        last
    }

    /// Tells it to end in good order, and waits until it has.
    pub(crate) fn end(mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("a process that lives");
        let begun = Instant::now();
        while self.process.try_wait().expect("its end").is_none() {
            assert!(begun.elapsed() < HUNG, "the broker does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
