//! What `claviger exec` adds to the start of a command, its broker warm on its socket; against `env`, which reads its
//! variables from its arguments.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::percentile;
use crate::process::{Side, pin};
use crate::program::{CLAVIGER, Program, command};
use crate::report::{Report, milliseconds};

/// Runs before, which are not counted.
const WARM: usize = 3;

/// Every field of the sample secrets but one, under the application's names and under those of its tools.
const REFERENCES: [(&str, &str); 20] = [
    ("DB_HOST", "database#host"),
    ("DB_PORT", "database#port"),
    ("DB_NAME", "database#dbname"),
    ("DB_USER", "database#username"),
    ("DB_PASSWORD", "database#password"),
    ("PGHOST", "database#host"),
    ("PGPORT", "database#port"),
    ("PGDATABASE", "database#dbname"),
    ("PGUSER", "database#username"),
    ("PGPASSWORD", "database#password"),
    ("REDIS_HOST", "redis#host"),
    ("REDIS_PORT", "redis#port"),
    ("REDIS_PASSWORD", "redis#password"),
    ("REDISCLI_AUTH", "redis#password"),
    ("JWT_SECRET", "jwt#secret"),
    ("JWT_REFRESH_SECRET", "jwt#refresh_secret"),
    ("MARKET_DATA_API_KEY", "api-keys#market_data"),
    ("NEWS_API_KEY", "api-keys#news"),
    ("EMAIL_API_KEY", "api-keys#email"),
    ("SMTP_PASSWORD", "api-keys#email"),
];

/// The median of so many runs of each, the one after the other.
pub(crate) fn measure(folder: &Path, runs: usize, report: &mut Report) {
    let manifest = folder.join("claviger.toml");
    let variables = REFERENCES.map(|(name, reference)| format!("{name} = \"{reference}\"\n"));
    std::fs::write(&manifest, format!("[env]\n{}", variables.concat())).unwrap();
    let socket = folder.join("dev.sock");
    let _broker = start(folder, &socket);
    let mut env = command(ENV);
    env.args(["X=1", "true"]);
    let mut exec = command(CLAVIGER);
    exec.args(["exec", "-e", "development", "-a"]).arg(format!("unix://{}", socket.display()));
    exec.arg("-m").arg(&manifest).args(["--", "true"]);
    let (mut bare, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..WARM + runs {
        bare.push(time(&mut env));
        ours.push(time(&mut exec));
    }
    let bare = percentile(&mut bare[WARM..], 50);
    let ours = percentile(&mut ours[WARM..], 50);
    let more = (ours.as_secs_f64() - bare.as_secs_f64()) * 1e3;
    report.figure("exec_20_ms", more);
    report.figure("env_ms", bare.as_secs_f64() * 1e3);
    let name = "`exec` with 20 references over `env`, its broker warm";
    report.row([name, &milliseconds(bare), &milliseconds(ours), &format!("{more:+.2} ms"), "≤ 5 ms"]);
}

/// By its path, as the other program is: one that has to be looked for is started in a slower way.
const ENV: &str = "/usr/bin/env";

fn time(command: &mut Command) -> Duration {
    let start = Instant::now();
    let output = command.output();
    let took = start.elapsed();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} ended with {}: {said}", output.status);
    took
}

/// A throw-away broker with the sample secrets.
fn start(folder: &Path, socket: &Path) -> Program {
    let mut dev = command(CLAVIGER);
    dev.env("USER", "benchmark").arg("dev");
    dev.arg("--data").arg(folder.join("dev")).arg("--socket").arg(socket);
    // A process starts on the core of who starts it.
    pin(Side::Server);
    let broker = Program::start(&mut dev);
    pin(Side::Client);
    broker
}
