//! The words of the house: names, references, values, versions, labels and their rules. No I/O, no async.
//!
//! ```text
//! environment ─┬─ secret (a name) ─┬─ version id ── value (opaque, wiped)
//!              │                   │      ▲
//!              │                   └─ staging label ┘   AWSCURRENT, AWSPENDING, AWSPREVIOUS, the user's own
//! ```

mod label;
mod name;
mod reference;
mod selector;
mod value;
mod version;

pub use label::{Label, LabelError, LabelMove, Labels, MAX_LABELS_PER_VERSION};
pub use name::{EnvironmentName, FieldName, NameError, SecretId, SecretName};
pub use reference::Reference;
pub use selector::Selector;
pub use value::{ContentType, FieldError, MAX_VALUE_BYTES, SecretValue, ValueError};
pub use version::{Version, VersionId};
