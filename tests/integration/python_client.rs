//! A client that shares no code with this program: Python, and what grpcio generates from `proto/` alone.

use std::path::Path;
use std::process::Command;

use crate::support::moto::python;
use crate::support::program::{Program, claviger};

#[test]
fn a_client_in_another_language_needs_nothing_but_the_protos() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, data) = (folder.path().join("dev.sock"), folder.path().join("data"));
    let mut command = claviger(["dev", "--listen", "127.0.0.1:0"]);
    command.arg("--data").arg(&data).arg("--socket").arg(&socket);
    let program = Program::start(command, socket.clone());
    program.wait_for_log("listening on http://");
    let log = program.log();
    let address = log.split_whitespace().find_map(|word| word.strip_prefix("http://")).unwrap();

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/client.py");
    // Each wait within it is bounded. The working directory is where nothing of Python's lies about.
    let output = Command::new(python())
        .arg("-B")
        .arg(script)
        .arg(&socket)
        .arg(address)
        .current_dir(folder.path())
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}; `bash tests/run` makes it", python().display()));
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{complained}\nthe broker:\n{}", program.log());
    assert_eq!(said.lines().filter(|line| line.starts_with("ok ")).count(), 10, "{said}");
}
