//! Cached reads over the wire, one at a time: how many a second, what each costs the server, and how late the slowest.

use std::fs::File;
use std::io::Write as _;
use std::time::{Duration, Instant};

use crate::client::{Bench, Client, Server, What, at_10k, p99 as p99_of};
use crate::process::{Side, pin};
use crate::report::{Report, microseconds, milliseconds};
use crate::turns::{Turn, median, paired, sum, take_turns};
use crate::{VALUE, percentile};

/// Connections and streams on each; what it is called in figures; and who is measured beside the echo: its name, its
/// figure's name and its target.
type Row = ((usize, usize), &'static str, &'static [(&'static str, &'static str, &'static str)]);

const ROWS: [Row; 5] = [
    ((4, 16), "echo_64", &[("durable", "durable_64", "≥ 0.55"), ("relaxed", "relaxed_64", "≥ 0.8")]),
    ((16, 16), "echo_256", &[("durable", "durable_256", "≥ 0.7")]),
    ((16, 1), "echo_16x1", &[("relaxed", "relaxed_16x1", "–")]),
    ((64, 1), "echo_64x1", &[("relaxed", "relaxed_64x1", "–"), ("durable", "durable_64x1", "–")]),
    ((256, 1), "echo_256x1", &[("relaxed", "relaxed_256x1", "–")]),
];

pub(crate) fn rates(bench: &Bench<'_>, report: &mut Report) {
    for (shape, echo, brokers) in ROWS {
        let server = |name: &str| if name == "durable" { &bench.durable } else { &bench.relaxed };
        let servers: Vec<&Server> =
            [&bench.echo].into_iter().chain(brokers.iter().map(|&(name, ..)| server(name))).collect();
        let turns = bench.in_turn(&servers, shape, What::Same);
        let (bare, ours) = turns.split_first().expect("the echo's");
        figures_of(echo, bare, report);
        for ((name, figure, target), ours) in brokers.iter().zip(ours) {
            let shape = format!("{name}, {} × {}", shape.0, shape.1);
            let ratio = paired(ours, bare, Turn::rate);
            report.figure(*figure, ratio);
            figures_of(figure, ours, report);
            compare(&shape, (bare, ours), ratio, target, report);
        }
    }
}

/// A row for the rate, and one for what a read costs the server.
fn compare(shape: &str, (bare, ours): (&[Turn], &[Turn]), ratio: f64, target: &str, report: &Report) {
    let rate = |turns: &[Turn]| format!("{:.0}", median(turns.iter().map(Turn::rate).collect()));
    let name = format!("cached reads a second, {shape}");
    report.row([&name, &rate(bare), &rate(ours), &format!("{ratio:.2}"), target]);
    let (bare, ours) = (sum(bare).cpu_each(), sum(ours).cpu_each());
    let name = format!("the server's processor time for each, {shape}");
    let ratio = format!("{:.2}", ours / bare);
    report.row([&name, &microseconds(bare), &microseconds(ours), &ratio, "–"]);
}

fn figures_of(name: &str, turns: &[Turn], report: &mut Report) {
    report.figure(format!("{name}_per_s"), median(turns.iter().map(Turn::rate).collect()));
    report.figure(format!("{name}_cpu_us"), sum(turns).cpu_each());
    report.figure(format!("{name}_busy"), sum(turns).busy());
}

/// Over so many connections requests come at a steady rate.
const CONNECTIONS: usize = 16;

/// Echo, brokers and disk in turn. Against the echo the median of the paired ratios counts, as for rates. A turn has too
/// few commits for a percentile, so against the disk both are of all turns together.
pub(crate) fn p99(bench: &Bench<'_>, report: &mut Report) {
    let window = bench.window * 2;
    let servers = [&bench.echo, &bench.relaxed, &bench.durable];
    let clients: Vec<Vec<Client>> =
        servers.iter().map(|server| bench.runtime.block_on(server.connect(CONNECTIONS))).collect();
    let mut file = File::create_new(bench.folder.join("commits")).unwrap();
    let turns = take_turns(bench.rounds, servers.len() + 1, |number, part| match clients.get(number) {
        Some(clients) => bench.runtime.block_on(at_10k(clients, part.of(window))),
        None => {
            // Where the broker's commits are made.
            pin(Side::Server);
            let times = commit_times(&mut file, part.of(bench.window));
            pin(Side::Client);
            times
        }
    });
    let [bare, relaxed, durable, commits] = <[_; 4]>::try_from(turns).expect("four took turns");
    let late = |times: &Vec<Duration>| p99_of(times).as_secs_f64();
    let usual = |turns: &[Vec<Duration>]| median(turns.iter().map(late).collect());
    let of_all = |turns: Vec<Vec<Duration>>| percentile(&mut turns.concat(), 99).as_secs_f64();

    let [bare_p99, relaxed_p99, durable_p99] = [&bare, &relaxed, &durable].map(|turns| usual(turns));
    let ratio = paired(&relaxed, &bare, late);
    report.figure("p99_relaxed_10k", ratio);
    row("relaxed, against the echo's", (bare_p99, relaxed_p99), ratio, "≤ 1.3", report);
    let ratio = paired(&durable, &bare, late);
    report.figure("p99_durable_10k_echo", ratio);
    row("durable, against the echo's", (bare_p99, durable_p99), ratio, "–", report);

    for (name, times) in [("echo", &bare), ("relaxed", &relaxed), ("durable", &durable)] {
        for percent in [50, 90] {
            let of_turns =
                times.iter().map(|times| percentile(&mut times.clone(), percent).as_secs_f64() * 1e3);
            report.figure(format!("{name}_p{percent}_10k_ms"), median(of_turns.collect()));
        }
    }

    let (commit, durable_of_all) = (of_all(commits), of_all(durable));
    let ratio = durable_of_all / commit;
    report.figure("p99_durable_10k", ratio);
    row("durable, against the disk's commits", (commit, durable_of_all), ratio, "≤ 3", report);
    for (name, seconds) in [
        ("echo_p99_10k_ms", bare_p99),
        ("relaxed_p99_10k_ms", relaxed_p99),
        ("durable_p99_10k_ms", durable_p99),
        ("disk_commit_p99_ms", commit),
    ] {
        report.figure(name, seconds * 1e3);
    }
}

fn row(name: &str, (bare, ours): (f64, f64), ratio: f64, target: &str, report: &Report) {
    let name = format!("p99 at 10,000 reads a second over {CONNECTIONS} connections, {name}");
    let [bare, ours] = [bare, ours].map(|seconds| milliseconds(Duration::from_secs_f64(seconds)));
    report.row([&name, &bare, &ours, &format!("{ratio:.2}"), target]);
}

/// How long the disk takes, asked up to 500 times a second, to commit a value's size at the end of a file: the least
/// that a durable answer waits for.
fn commit_times(file: &mut File, window: Duration) -> Vec<Duration> {
    const GAP: Duration = Duration::from_millis(2);
    let begin = Instant::now();
    let mut times = Vec::new();
    while begin.elapsed() < window {
        let start = Instant::now();
        file.write_all(&[b'x'; VALUE]).unwrap();
        file.sync_data().unwrap();
        let took = start.elapsed();
        times.push(took);
        std::thread::sleep(GAP.saturating_sub(took));
    }
    times
}
