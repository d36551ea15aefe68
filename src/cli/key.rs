//! `claviger key`: the broker's own keys.
//!
//! ```text
//! init            {"id","file"}
//! rotate          {"root_key_id","total","rewrapped","retired"}
//! rotate --audit  {"audit_key":{"id","public_key","in_force"},"at"}
//! status          {"root_keys":[{"id","origin","wrapped","in_force"}],"audit_keys":[{"id","public_key","in_force"}]}
//! ```
//! No key is ever shown, but for the public half of one that signs.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::Serialize;

use super::connect::connect;
use super::output::{self, Output, moment, table};
use super::{CliError, Context, Exit};
use crate::client::ClientError;
use crate::crypto::RootKey;
use crate::proto::v1;

/// What can be done with keys.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Make a new root key in a file; no broker is asked
    Init(InitArgs),
    /// Wrap everything by a new root key, or have the audit log signed with a new key
    Rotate(RotateArgs),
    /// Show which keys there are, and how much is under which
    Status,
}

/// What `key init` takes.
#[derive(clap::Args)]
pub(super) struct InitArgs {
    /// File to make; one that exists is never overwritten
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
}

/// What `key rotate` takes.
#[derive(clap::Args)]
pub(super) struct RotateArgs {
    /// Rotate the key that the audit log is signed with, not the root key
    #[arg(long, conflicts_with = "rewrap_only")]
    audit: bool,
    /// Make no new root key: only wrap by the newest one what is still under another
    #[arg(long)]
    rewrap_only: bool,
}

/// Does one of them.
pub(super) async fn run(command: Command, context: &Context) -> Result<Exit, CliError> {
    match command {
        Command::Init(args) => init(&args, context.output)?,
        Command::Rotate(args) if args.audit => rotate_audit(context).await?,
        Command::Rotate(args) => rotate_root(&args, context).await?,
        Command::Status => status(context).await?,
    }
    Ok(Exit::DONE)
}

fn init(args: &InitArgs, output: Output) -> Result<(), CliError> {
    let shape = make(args)?;
    output.notice("keep a copy of it elsewhere: without it every value that is sealed under it is lost");
    output.notice(&format!(
        "a broker that has nothing yet starts with it as `file = \"{}\"` in [root_key]; for one that has, it is \
         the new key, and the one before goes into `previous` until `claviger key rotate` is through",
        shape.file
    ));
    output.answer(&shape, || format!("root key {}: made in {}", shape.id, shape.file))
}

fn make(args: &InitArgs) -> Result<Made, CliError> {
    let key = RootKey::generate()?;
    key.create_file(&args.file)?;
    Ok(Made { id: key.id().to_string(), file: args.file.display().to_string() })
}

async fn rotate_root(args: &RotateArgs, context: &Context) -> Result<(), CliError> {
    let request = v1::RotateRootKeyRequest { reason: context.reason(), rewrap_only: args.rewrap_only };
    let mut keys = connect(context).await?.keys_without_deadline();
    let steps = keys.rotate_root_key(request).await.map_err(ClientError::from)?.into_inner();
    let ended = follow(steps, context.output).await;
    context.output.progress("");
    let shape = Rotated::from(ended?);
    context.output.answer(&shape, || shape.text())
}

/// Shows how far it is, and gives how it ended.
async fn follow(
    mut steps: tonic::Streaming<v1::RotateRootKeyResponse>,
    output: Output,
) -> Result<v1::RotateRootKeyResponse, ClientError> {
    while let Some(step) = steps.message().await? {
        if step.finished {
            return Ok(step);
        }
        let v1::RotateRootKeyResponse { done, total, rewrapped, .. } = step;
        output.progress(&format!("{done} of {total} keys looked at, {rewrapped} wrapped anew"));
    }
    Err(ClientError::malformed("ends before the rotation does"))
}

async fn rotate_audit(context: &Context) -> Result<(), CliError> {
    let request = v1::RotateAuditKeyRequest { reason: context.reason() };
    let mut keys = connect(context).await?.keys();
    let answer = keys.rotate_audit_key(request).await.map_err(ClientError::from)?.into_inner();
    let key = answer.key.ok_or_else(|| ClientError::malformed("holds no key"))?;
    let shape = AuditRotated { audit_key: AuditKey::from(key), at: output::time(answer.at) };
    context.output.notice(
        "whoever verifies the log elsewhere needs the new public half; it vouches for the earlier ones",
    );
    context.output.answer(&shape, || {
        let AuditKey { id, public_key, .. } = &shape.audit_key;
        format!("audit key {id}: in force since {}, public half {public_key}", moment(shape.at))
    })
}

async fn status(context: &Context) -> Result<(), CliError> {
    let request = v1::GetKeyStatusRequest { reason: context.reason() };
    let mut keys = connect(context).await?.keys();
    let answer = keys.get_key_status(request).await.map_err(ClientError::from)?.into_inner();
    let shape = Status {
        root_keys: answer.root_keys.into_iter().map(RootKeyShape::from).collect(),
        audit_keys: answer.audit_keys.into_iter().map(AuditKey::from).collect(),
    };
    context.output.answer(&shape, || shape.text())
}

#[derive(Serialize)]
struct Made {
    id: String,
    file: String,
}

#[derive(Serialize)]
struct Rotated {
    root_key_id: String,
    total: u64,
    rewrapped: u64,
    retired: Option<String>,
}

impl From<v1::RotateRootKeyResponse> for Rotated {
    fn from(ended: v1::RotateRootKeyResponse) -> Self {
        Self {
            root_key_id: ended.root_key_id,
            total: ended.total,
            rewrapped: ended.rewrapped,
            retired: Some(ended.retired).filter(|path| !path.is_empty()),
        }
    }
}

impl Rotated {
    fn text(&self) -> String {
        let Self { root_key_id, total, rewrapped, retired } = self;
        let earlier = match (retired, rewrapped) {
            (Some(path), _) => {
                format!("the earlier key is in {}, for backups made until now", output::printable(path))
            }
            (None, 0) => "everything was under it already, and no new key was made".to_owned(),
            // No file gave way, so what it was under is what the configuration names.
            (None, _) => {
                "no new key was made, and root_key.previous can go; keep what it named for backups made until now"
                    .to_owned()
            }
        };
        format!("root key {root_key_id}: in force, {rewrapped} of {total} keys wrapped anew; {earlier}")
    }
}

#[derive(Serialize)]
struct AuditRotated {
    audit_key: AuditKey,
    at: Option<Timestamp>,
}

#[derive(Serialize)]
struct Status {
    root_keys: Vec<RootKeyShape>,
    audit_keys: Vec<AuditKey>,
}

impl Status {
    fn text(&self) -> String {
        let root = self
            .root_keys
            .iter()
            .map(|key| [key.id.clone(), state(key.in_force), key.wrapped.to_string(), key.origin.clone()]);
        let audit =
            self.audit_keys.iter().map(|key| [key.id.clone(), state(key.in_force), key.public_key.clone()]);
        let root = table(["ROOT KEY", "STATE", "WRAPS", "READ FROM"], root);
        let audit = table(["AUDIT KEY", "STATE", "PUBLIC HALF"], audit);
        format!("{root}\n{audit}")
    }
}

fn state(in_force: bool) -> String {
    if in_force { "in force" } else { "other" }.to_owned()
}

#[derive(Serialize)]
struct RootKeyShape {
    id: String,
    origin: String,
    wrapped: u64,
    in_force: bool,
}

impl From<v1::RootKey> for RootKeyShape {
    fn from(key: v1::RootKey) -> Self {
        Self { id: key.id, origin: key.origin, wrapped: key.wrapped, in_force: key.in_force }
    }
}

#[derive(Serialize)]
struct AuditKey {
    id: String,
    public_key: String,
    in_force: bool,
}

impl From<v1::AuditKey> for AuditKey {
    fn from(key: v1::AuditKey) -> Self {
        Self { id: key.id, public_key: key.public_key, in_force: key.in_force }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::refusal;
    use super::*;
    use crate::error::Reason;
    use std::os::unix::fs::PermissionsExt as _;

    fn ended(retired: &str, rewrapped: u64) -> Rotated {
        Rotated::from(v1::RotateRootKeyResponse {
            total: 12,
            rewrapped,
            finished: true,
            root_key_id: "abc".to_owned(),
            retired: retired.to_owned(),
            ..v1::RotateRootKeyResponse::default()
        })
    }

    #[test]
    fn the_end_says_where_the_earlier_key_is() {
        let text = ended("/k/root.key.retired-1", 7).text();
        assert!(text.starts_with("root key abc: in force, 7 of 12 keys wrapped anew; "), "{text}");
        assert!(text.contains("/k/root.key.retired-1"), "{text}");
        let text = ended("", 7).text();
        assert!(text.contains("no new key was made") && text.contains("root_key.previous can go"), "{text}");
        let text = ended("", 0).text();
        assert!(text.contains("0 of 12 keys wrapped anew; everything was under it already"), "{text}");
        assert!(!text.contains("previous"), "none may be configured: {text}");
        let json = serde_json::to_string(&ended("", 7)).unwrap();
        assert_eq!(json, r#"{"root_key_id":"abc","total":12,"rewrapped":7,"retired":null}"#);
    }

    #[test]
    fn keys_are_shown_as_two_tables() {
        let shown = Status {
            root_keys: vec![
                RootKeyShape { id: "a".to_owned(), origin: "file /k".to_owned(), wrapped: 3, in_force: true },
                RootKeyShape {
                    id: "b".to_owned(),
                    origin: "file /l".to_owned(),
                    wrapped: 0,
                    in_force: false,
                },
            ],
            audit_keys: vec![AuditKey { id: "c".to_owned(), public_key: "00".to_owned(), in_force: true }],
        };
        let expected = "ROOT KEY  STATE     WRAPS  READ FROM\n\
                        a         in force  3      file /k\n\
                        b         other     0      file /l\n\n\
                        AUDIT KEY  STATE     PUBLIC HALF\n\
                        c          in force  00\n";
        assert_eq!(shown.text(), expected);
    }

    #[test]
    fn a_new_key_is_private_and_never_takes_another_s_place() {
        let folder = tempfile::tempdir().unwrap();
        let args = InitArgs { file: folder.path().join("root.key") };
        let shape = make(&args).unwrap();
        assert_eq!((shape.id.len(), shape.file.as_str()), (32, args.file.to_str().unwrap()));
        let made = std::fs::read(&args.file).unwrap();
        assert_eq!(made.len(), 65);
        assert_eq!(std::fs::metadata(&args.file).unwrap().permissions().mode() & 0o7777, 0o600);
        let refused = |args: &InitArgs| make(args).err().unwrap();
        assert_eq!(refused(&args).reason, Some(Reason::InvalidKey));
        assert!(refused(&args).message.contains("never overwritten"));
        assert_eq!(std::fs::read(&args.file).unwrap(), made);
        let nowhere = InitArgs { file: folder.path().join("no/root.key") };
        assert_eq!(refused(&nowhere).reason, Some(Reason::InvalidKey));
    }

    #[test]
    fn the_two_kinds_of_rotation_exclude_each_other() {
        for arguments in [&["key", "rotate", "--audit", "--rewrap-only"][..], &["key", "init"], &["key"]] {
            assert_eq!(refusal(arguments).exit_code(), 2, "{arguments:?}");
        }
    }
}
