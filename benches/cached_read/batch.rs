//! A batch of cached secrets, against as many single reads: one after the other, and many at once. One record each
//! either way.

use std::time::Duration;

use crate::client::{Bench, Client, Line, Server, What};
use crate::report::{Report, microseconds, milliseconds};
use crate::server::BATCH;
use crate::turns::{Turn, paired, sum};

pub(crate) fn measure(bench: &Bench<'_>, report: &mut Report) {
    for (name, server) in [("durable", &bench.durable), ("relaxed", &bench.relaxed)] {
        let turns = in_turn(bench, server);
        let [batches, singles, at_once] = <[_; 3]>::try_from(turns).expect("three took turns");
        let cost = |singles: &[Turn]| paired(&batches, singles, Turn::rate).recip() / BATCH as f64;
        let target = if name == "durable" { "≤ 0.05" } else { "–" };

        let (ratio, against) = (cost(&singles), "one after the other on one connection");
        report.figure(format!("batch_{BATCH}_{name}"), ratio);
        let shown = [&singles, &batches].map(|turns| sum(turns));
        row(name, against, (whole(&shown[0]), each(&shown[1])), ratio, target, report);

        let (ratio, against) = (cost(&at_once), "64 at once over 4 connections");
        report.figure(format!("batch_{BATCH}_{name}_64"), ratio);
        let at_once = sum(&at_once);
        row(name, against, (whole(&at_once), each(&shown[1])), ratio, "–", report);

        // Against the cheaper ones: those that share their wake-ups and their commits.
        let (bare, ours) = (at_once.cpu_each() * BATCH as f64, shown[1].cpu_each());
        report.figure(format!("batch_{BATCH}_{name}_cpu"), ours / bare);
        let cells = (microseconds(bare), microseconds(ours));
        row(name, "64 at once, the server's processor time", cells, ours / bare, "–", report);
    }
}

fn in_turn(bench: &Bench<'_>, server: &Server) -> Vec<Vec<Turn>> {
    let connect = |connections| bench.runtime.block_on(server.connect(connections));
    let line = |clients: Vec<Client>, streams, what| Line { server, clients, streams, what };
    let lines = [
        line(connect(1), 1, What::AllAtOnce),
        line(connect(1), 1, What::EachInTurn),
        line(connect(4), 16, What::EachInTurn),
    ];
    // Cached, all of them, before the first turn.
    bench.runtime.block_on(lines[0].clients[0].clone().ask(What::AllAtOnce, 0));
    bench.lines_in_turn(&lines, bench.window / 2)
}

/// How long as many single reads take as a batch has.
fn whole(singles: &Turn) -> String {
    milliseconds(Duration::from_secs_f64(BATCH as f64 / singles.rate()))
}

fn each(batches: &Turn) -> String {
    milliseconds(Duration::from_secs_f64(1.0 / batches.rate()))
}

fn row(name: &str, against: &str, (bare, ours): (String, String), ratio: f64, target: &str, report: &Report) {
    let name = format!("a batch of {BATCH} cached secrets, {name}, against {BATCH} single reads, {against}");
    report.row([&name, &bare, &ours, &format!("{ratio:.3}"), target]);
}
