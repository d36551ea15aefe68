//! A module may use only modules to its left in this order.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test stops where it fails"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const ORDER: [&str; 22] = [
    "error",
    "telemetry",
    "secret",
    "clock",
    "crypto",
    "kv",
    "environment",
    "identity",
    "approval",
    "policy",
    "audit",
    "store",
    "cache",
    "broker",
    "rotation",
    "proto",
    "client",
    "inject",
    "server",
    "config",
    "cli",
    "main",
];

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a readable folder") {
        let path = entry.expect("a readable entry").path();
        if path.is_dir() {
            files_below(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The top-level module that a file belongs to; `None` for the map itself.
fn module_of(file: &Path, root: &Path) -> Option<String> {
    let first = file.strip_prefix(root).ok()?.components().next()?;
    let name = Path::new(first.as_os_str()).file_stem()?.to_str()?.to_owned();
    (name != "lib").then_some(name)
}

/// Every module that a source text names behind `crate::` (or, in the binary, `claviger::`), with its line. Comments
/// are left out, because a link in them is no use.
fn uses(text: &str, root: &str) -> Vec<(String, usize)> {
    let code: String = text.lines().map(without_comment).collect::<Vec<_>>().join("\n");
    let mut found = Vec::new();
    for (position, _) in code.match_indices(root) {
        let line = code[..position].matches('\n').count() + 1;
        let rest = &code[position + root.len()..];
        for name in first_names(rest) {
            found.push((name, line));
        }
    }
    found
}

/// The line up to a comment; `//` behind a quotation mark that is still open is text.
fn without_comment(line: &str) -> &str {
    let comment = line.match_indices("//").find(|(at, _)| line[..*at].matches('"').count().is_multiple_of(2));
    comment.map_or(line, |(at, _)| &line[..at])
}

/// The first segment of a path; of each path, where it starts with a group, over as many lines as it has.
fn first_names(rest: &str) -> Vec<String> {
    let name = |text: &str| -> String {
        text.trim_start().chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect()
    };
    let Some(group) = rest.strip_prefix('{') else {
        return Some(name(rest)).filter(|name| !name.is_empty()).into_iter().collect();
    };
    let (mut names, mut depth, mut start) = (Vec::new(), 0_i32, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            '}' | ',' if depth == 0 => {
                names.push(name(&group[start..at]));
                start = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

fn rank(module: &str) -> Option<usize> {
    ORDER.iter().position(|known| *known == module)
}

/// What stands against the order in these sources, one line each.
fn violations(sources: &BTreeMap<PathBuf, (String, String)>) -> Vec<String> {
    let mut found = Vec::new();
    for (path, (module, text)) in sources {
        let Some(here) = rank(module) else {
            found.push(format!("{}: module `{module}` has no place in the order", path.display()));
            continue;
        };
        let root = if module == "main" { "claviger::" } else { "crate::" };
        for (used, line) in uses(text, root) {
            match rank(&used) {
                Some(there) if there <= here => {}
                Some(_) => found.push(format!(
                    "{}:{line}: `{module}` uses `{used}`, which is to its right",
                    path.display()
                )),
                None => found.push(format!("{}:{line}: `{used}` has no place in the order", path.display())),
            }
        }
    }
    found
}

#[test]
fn no_arrow_points_right() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    files_below(&root, &mut files);
    let sources: BTreeMap<_, _> = files
        .into_iter()
        .filter_map(|file| {
            let module = module_of(&file, &root)?;
            let text = fs::read_to_string(&file).expect("a readable file");
            Some((file, (module, text)))
        })
        .collect();
    assert!(sources.len() > 20, "the sources are found");
    let found = violations(&sources);
    assert!(found.is_empty(), "arrows against the layer order:\n{}", found.join("\n"));
}

#[test]
fn the_check_can_fail() {
    let source = |module: &str, text: &str| {
        BTreeMap::from([(PathBuf::from("x.rs"), (module.to_owned(), text.to_owned()))])
    };
    assert_eq!(violations(&source("secret", "use crate::broker::Broker;")).len(), 1);
    assert_eq!(violations(&source("kv", "let x = crate::cli::run();")).len(), 1);
    assert_eq!(violations(&source("kv", "use crate::{error::Reason, server};")).len(), 1);
    assert_eq!(
        violations(&source("kv", "use crate::{\n    error::{Reason, Reasoned},\n    server,\n};")).len(),
        1
    );
    assert_eq!(violations(&source("kv", "let x = \"a//b\"; crate::cli::run();")).len(), 1);
    assert_eq!(violations(&source("novelty", "")).len(), 1);
    assert_eq!(violations(&source("broker", "use crate::policy::Grant; // crate::cli")).len(), 0);
}
