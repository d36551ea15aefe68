//! Generated from `proto/claviger/v1` and checked in; `tests/integration/proto.rs` compares it with a fresh
//! generation. After a change of a `.proto` file: `CLAVIGER_REGENERATE=1 cargo test --test integration proto::`.

use std::fmt;

/// The API, version 1.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated code is not ours to style"
)]
pub mod v1 {
    include!("claviger.v1.rs");
}

/// The compiled descriptors, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("claviger.v1.bin");

/// The messages whose generated `Debug` is left out because they hold a value; each gets a redacted one below.
pub const WITHOUT_DEBUG: &[&str] = &[".claviger.v1.SecretPayload", ".claviger.v1.CreateTokenResponse"];

impl fmt::Debug for v1::SecretPayload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretPayload([redacted])")
    }
}

impl fmt::Debug for v1::CreateTokenResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CreateTokenResponse").field("token", &self.token).finish_non_exhaustive()
    }
}
