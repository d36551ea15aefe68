//! What the program weighs that users start: `claviger serve` on an embedded store, ready, before any request.

use std::path::Path;

use claviger::policy::SHIPPED;

use crate::process::{Side, megabytes, pin};
use crate::program::{CLAVIGER, Program, command};
use crate::report::Report;

pub(crate) fn measure(folder: &Path, report: &mut Report) {
    let folder = folder.join("start");
    let policies = folder.join("policies");
    std::fs::create_dir_all(&policies).unwrap();
    for (name, text) in SHIPPED {
        std::fs::write(policies.join(name), text).unwrap();
    }
    let config = folder.join("claviger.toml");
    std::fs::write(&config, text(&folder)).unwrap();
    let mut serve = command(CLAVIGER);
    serve.args(["serve", "--config"]).arg(&config);
    // A process starts on the core of who starts it.
    pin(Side::Server);
    let broker = Program::start(&mut serve);
    pin(Side::Client);
    let weight = megabytes(broker.settled_kib());
    broker.end();
    report.figure("rss_start_mb", weight);
    report.row(["memory of `claviger serve` at start", "–", &format!("{weight:.1} MB"), "–", "≤ 25 MB"]);
}

/// What a configuration for one machine says at least.
fn text(folder: &Path) -> String {
    let folder = folder.display();
    format!(
        "[listen]\nunix = \"{folder}/claviger.sock\"\n\
         [kv]\ndirectory = \"{folder}/data\"\n\
         [root_key]\nfile = \"{folder}/data/keys/root.key\"\n\
         [policy]\ndirectory = \"{folder}/policies\"\n\
         [environments.development]\naudit = \"relaxed\"\n\
         [environments.staging]\n\
         [environments.production]\nprotected = true\n"
    )
}
