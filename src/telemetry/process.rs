//! What the kernel says of this process, read when somebody asks.

use std::fs;

use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};

/// This process, as it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Process {
    /// When it started, in seconds since 1970.
    pub start_time_seconds: f64,
    /// Processor time that it used, in seconds, in the kernel and outside.
    pub cpu_seconds: f64,
    /// Memory that is resident, in bytes.
    pub resident_bytes: u64,
    /// File descriptors that are open.
    pub open_fds: u64,
    /// How many may be; `None` where there is no bound.
    pub max_fds: Option<u64>,
}

impl Process {
    /// Reads it from `/proc`; `None` where that is not there or not as proc(5) has it.
    #[must_use]
    pub fn read() -> Option<Self> {
        let text = fs::read_to_string("/proc/self/stat").ok()?;
        let stat = Stat::parse(&text)?;
        let booted = booted(&fs::read_to_string("/proc/stat").ok()?)?;
        // The folder that is read is one of them.
        let open_fds = fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1);
        let ticks = clock_ticks_per_second().max(1) as f64;
        Some(Self {
            start_time_seconds: booted as f64 + stat.started as f64 / ticks,
            cpu_seconds: stat.used as f64 / ticks,
            resident_bytes: stat.resident_pages.saturating_mul(page_size() as u64),
            open_fds: open_fds as u64,
            max_fds: getrlimit(Resource::Nofile).current,
        })
    }
}

/// Fields 14, 15, 22 and 24 of `/proc/PID/stat` (proc_pid_stat(5)); times in clock ticks.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    used: u64,
    started: u64,
    resident_pages: u64,
}

impl Stat {
    /// Field 2, the program's name, may hold anything; what follows its last parenthesis is field 3.
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<_> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number.checked_sub(3)?)?.parse::<u64>().ok();
        Some(Self {
            used: field(14)?.saturating_add(field(15)?),
            started: field(22)?,
            resident_pages: field(24)?,
        })
    }
}

/// When the machine started, in seconds since 1970 (proc_stat(5), `btime`).
fn booted(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_parentheses_moves_no_field() {
        let text = "7 (a) b (c) S 1 7 7 0 -1 4194304 10 0 0 0 30 12 0 0 20 0 9 0 5000 1000 250 18446744073709551615\n";
        assert_eq!(Stat::parse(text), Some(Stat { used: 42, started: 5_000, resident_pages: 250 }));
        for bad in ["", "7 (a", "7 (a) S 1 2", "7 (a) S x x x x x x x x x x x x x x x x x x x x x x x"] {
            assert_eq!(Stat::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn this_process_is_there() {
        let process = Process::read().unwrap();
        assert!(process.open_fds >= 3 && process.resident_bytes > 100_000, "{process:?}");
        assert!(process.start_time_seconds > 1_500_000_000.0, "{process:?}");
    }
}
