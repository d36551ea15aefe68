//! Everything that needs more than one module, or a real server beside it. `bash tests/run` starts from nothing.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unreachable,
    unreachable_pub,
    clippy::disallowed_methods,
    reason = "a test stops at the first thing that is not as it should be"
)]

mod audit;
mod audit_keys;
mod audit_prepared;
mod audit_reserve;
mod aws;
mod broker;
mod cache;
mod cold;
mod check;
mod client;
mod commands;
mod crash;
mod deploy;
mod faults;
mod floods;
mod golden;
mod health;
mod inject;
mod keys;
mod kv_conformance;
mod leaks;
mod limits;
mod logs;
mod policy;
mod postgresql;
mod proto;
mod python_client;
mod rotation_chaos;
mod rotation_cli;
mod rotation_model;
mod rotation_service;
mod scale;
mod soak;
mod store_conformance;
mod support;
mod tls;
mod watch;
mod wire;
