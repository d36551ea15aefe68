//! What the kernel says of a process, and on which core one runs.

use std::sync::OnceLock;
use std::time::Duration;

/// The processor time that a process has taken so far, all of its threads, its own and the kernel's for it: proc(5),
/// `/proc/PID/stat`, fields 14 and 15, in ticks of usually 10 ms.
pub(crate) fn cpu(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process that lives");
    // The second field is the program's name in parentheses, and may hold anything.
    let (_, from_the_third) = stat.rsplit_once(')').expect("a name in parentheses");
    let times = from_the_third.split_whitespace().skip(11).take(2);
    let ticks: u64 = times.map(|field| field.parse::<u64>().expect("a number of ticks")).sum();
    Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// The memory that a process has in use (`VmRSS`), in KiB.
pub(crate) fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process that lives");
    let line = status.lines().find(|line| line.starts_with("VmRSS")).expect("its size");
    line.split_whitespace().nth(1).and_then(|size| size.parse().ok()).expect("a number of KiB")
}

/// KiB as the megabytes of the targets.
pub(crate) fn megabytes(kib: u64) -> f64 {
    kib as f64 * 1.024e-3
}

/// What has a core of its own.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Side {
    Client,
    Server,
}

/// Keeps this thread, and whatever it starts from now on, on one core. The server has that which the disk's interrupts come
/// to, where the kernel says so: there, what the disk has done is known to whoever waits for it. On the client's core it
/// would first have to wait until the client lets go of it, which is none of the server's cost.
pub(crate) fn pin(side: Side) {
    static SERVER: OnceLock<usize> = OnceLock::new();
    let server = *SERVER.get_or_init(|| interrupted().unwrap_or(0));
    let core = match side {
        Side::Server => server,
        Side::Client => 1 - server,
    };
    let mut cores = rustix::thread::CpuSet::new();
    cores.set(core);
    if let Err(error) = rustix::thread::sched_setaffinity(None, &cores) {
        eprintln!("not pinned to core {core}: {error}");
    }
}

/// Which of the first two cores has had more interrupts of the disks.
fn interrupted() -> Option<usize> {
    let table = std::fs::read_to_string("/proc/interrupts").ok()?;
    let mut counts = [0_u64; 2];
    let of_disks =
        |line: &&str| ["-req.", "nvme", "ahci", "virtblk", "xvd"].iter().any(|name| line.contains(name));
    for line in table.lines().filter(of_disks) {
        for (count, more) in counts.iter_mut().zip(line.split_whitespace().skip(1)) {
            *count += more.parse::<u64>().unwrap_or(0);
        }
    }
    (counts != [0, 0]).then_some(usize::from(counts[1] > counts[0]))
}
