//! The root key: where it comes from, how it is told from another, and where it is kept.

use std::fmt;
use std::path::{Path, PathBuf};

use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use ring::aead::{AES_256_GCM, LessSafeKey, UnboundKey};
use ring::hmac;
use zeroize::Zeroizing;

use super::fill_random;
use super::key_file::{KeyError, KeyProblem, create_key_file, read_credential, read_key_file};
use super::memory::{Locked, wipe_stack_below};

/// The size of a root key, a data key and an integrity key.
pub const KEY_BYTES: usize = 32;

/// The size of a root key's id.
pub(super) const ROOT_KEY_ID_BYTES: usize = 16;
/// What the id is a MAC of. A root key MACs nothing else.
const ID_LABEL: &[u8] = b"claviger root key id v1";
const HEX_DIGITS: usize = 2 * KEY_BYTES;
/// Room for the longest form, with its line ending.
const MAX_FILE_BYTES: usize = HEX_DIGITS + 2;

/// Tells one root key from another without telling the key: HMAC-SHA256 under the key of a fixed label, cut to 128
/// bits. What is sealed says the id of its key, so that another key is called the wrong one, and not the data
/// corrupt. Shown as 32 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RootKeyId([u8; ROOT_KEY_ID_BYTES]);

impl RootKeyId {
    pub(super) const fn from_bytes(bytes: [u8; ROOT_KEY_ID_BYTES]) -> Self {
        Self(bytes)
    }

    pub(super) const fn as_bytes(&self) -> &[u8; ROOT_KEY_ID_BYTES] {
        &self.0
    }

    fn of(key: &[u8; KEY_BYTES]) -> Self {
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), ID_LABEL);
        let mut id = [0; ROOT_KEY_ID_BYTES];
        for (to, from) in id.iter_mut().zip(tag.as_ref()) {
            *to = *from;
        }
        Self(id)
    }
}

impl fmt::Display for RootKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for RootKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RootKeyId({self})")
    }
}

/// Where a root key is.
#[derive(Clone)]
pub enum RootKeySource {
    /// A file, as [`read_key_file`] wants it.
    File(PathBuf),
    /// A credential that systemd passes to the service.
    SystemdCredential {
        /// What `CREDENTIALS_DIRECTORY` says.
        directory: PathBuf,
        /// The credential.
        name: String,
    },
    /// An environment variable, which the caller has read. The weakest: see the warning of [`RootKey::load`].
    EnvironmentValue {
        /// The variable.
        name: String,
        /// What it holds: 64 hex digits.
        value: Zeroizing<String>,
    },
}

impl fmt::Debug for RootKeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "File({})", path.display()),
            Self::SystemdCredential { name, .. } => write!(f, "SystemdCredential({name})"),
            Self::EnvironmentValue { name, .. } => write!(f, "EnvironmentValue({name}, [redacted])"),
        }
    }
}

/// The key that wraps all others: AES-256, in a locked page of its own, wiped when it goes.
pub struct RootKey {
    id: RootKeyId,
    material: Locked<Material>,
}

struct Material {
    bytes: [u8; KEY_BYTES],
    aead: LessSafeKey,
}

impl RootKey {
    /// A fresh key.
    ///
    /// # Errors
    /// [`KeyProblem::Random`].
    pub fn generate() -> Result<Self, KeyError> {
        let key = Self::generated();
        wipe_stack_below();
        key
    }

    #[inline(never)]
    fn generated() -> Result<Self, KeyError> {
        let mut bytes = Zeroizing::new([0_u8; KEY_BYTES]);
        fill_random(bytes.as_mut_slice()).map_err(|_| KeyError::new("new root key", KeyProblem::Random))?;
        Self::from_bytes(&bytes)
    }

    /// The key of these bytes, which stay the caller's to wipe.
    ///
    /// # Errors
    /// [`KeyProblem::Cipher`].
    pub fn from_bytes(bytes: &[u8; KEY_BYTES]) -> Result<Self, KeyError> {
        let key = Self::built(bytes);
        wipe_stack_below();
        key
    }

    #[inline(never)]
    fn built(bytes: &[u8; KEY_BYTES]) -> Result<Self, KeyError> {
        let key = UnboundKey::new(&AES_256_GCM, bytes)
            .map_err(|_| KeyError::new("root key", KeyProblem::Cipher))?;
        let material = Locked::new(Material { bytes: *bytes, aead: LessSafeKey::new(key) });
        Ok(Self { id: RootKeyId::of(bytes), material })
    }

    /// Reads the key, and says what is to be warned of about its source.
    ///
    /// A file or a credential holds 32 raw bytes, or 64 hex digits with or without a line ending; a variable holds
    /// 64 hex digits.
    ///
    /// # Errors
    /// [`Reason::InvalidKey`](crate::error::Reason::InvalidKey), each fault with a message of its own.
    pub fn load(source: &RootKeySource) -> Result<(Self, Option<String>), KeyError> {
        let key = Self::loaded(source);
        wipe_stack_below();
        key
    }

    #[inline(never)]
    fn loaded(source: &RootKeySource) -> Result<(Self, Option<String>), KeyError> {
        match source {
            RootKeySource::File(path) => {
                let content = read_key_file(path, MAX_FILE_BYTES)?;
                let bytes =
                    parse(&content, Raw::Permitted).map_err(|problem| KeyError::of_file(path, problem))?;
                Ok((Self::from_bytes(&bytes)?, None))
            }
            RootKeySource::SystemdCredential { directory, name } => {
                let origin = format!("systemd credential `{}`", name.escape_default());
                let refuse = |problem| KeyError::new(&origin, problem);
                let path = inside(directory, name).ok_or_else(|| refuse(KeyProblem::CredentialName))?;
                let content = read_credential(&path, MAX_FILE_BYTES).map_err(refuse)?;
                let bytes = parse(&content, Raw::Permitted).map_err(refuse)?;
                Ok((Self::from_bytes(&bytes)?, None))
            }
            RootKeySource::EnvironmentValue { name, value } => {
                let origin = format!("environment variable `{}`", name.escape_default());
                let bytes = parse(value.as_bytes(), Raw::Refused)
                    .map_err(|problem| KeyError::new(&origin, problem))?;
                let warning = format!(
                    "the root key comes from the {origin}: it can be read in /proc/PID/environ as long as the process \
                     lives, and every child inherits it; use a systemd credential or a key file with mode 0600"
                );
                Ok((Self::from_bytes(&bytes)?, Some(warning)))
            }
        }
    }

    /// Writes the key to a new file, as 64 hex digits and a newline.
    ///
    /// # Errors
    /// As [`create_key_file`].
    pub fn create_file(&self, path: &Path) -> Result<(), KeyError> {
        let mut text = Zeroizing::new([b'\n'; HEX_DIGITS + 1]);
        for (digits, byte) in text.chunks_exact_mut(2).zip(&self.material.bytes) {
            HEXLOWER.encode_mut(&[*byte], digits);
        }
        create_key_file(path, text.as_slice())
    }

    /// Which key this is.
    #[must_use]
    pub const fn id(&self) -> RootKeyId {
        self.id
    }

    /// What could not be done to keep the key out of swap and core dumps, a line each, to warn of.
    #[must_use]
    pub fn shortfalls(&self) -> &[String] {
        self.material.shortfalls()
    }

    pub(super) fn aead(&self) -> &LessSafeKey {
        &self.material.aead
    }
}

impl fmt::Debug for RootKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RootKey([redacted], {})", self.id)
    }
}

/// Whether 32 raw bytes will do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Raw {
    Permitted,
    Refused,
}

fn parse(content: &[u8], raw: Raw) -> Result<Zeroizing<[u8; KEY_BYTES]>, KeyProblem> {
    let mut key = Zeroizing::new([0_u8; KEY_BYTES]);
    // A raw key may end in the byte that is a newline in text, so its length decides before any line ending does.
    let text = if content.len() == KEY_BYTES { content } else { without_line_ending(content) };
    match text.len() {
        0 => return Err(KeyProblem::Empty),
        KEY_BYTES if is_text(text) => return Err(KeyProblem::Text),
        KEY_BYTES if raw == Raw::Permitted && content.len() == KEY_BYTES => key.copy_from_slice(text),
        HEX_DIGITS => {
            HEXLOWER_PERMISSIVE
                .decode_mut(text, key.as_mut_slice())
                .map_err(|partial| KeyProblem::NotHex { position: partial.error.position + 1 })?;
        }
        _ => return Err(KeyProblem::Length(content.len())),
    }
    let first = key.first().copied();
    if key.iter().all(|byte| Some(*byte) == first) {
        return Err(KeyProblem::Placeholder);
    }
    Ok(key)
}

fn without_line_ending(content: &[u8]) -> &[u8] {
    let text = content.strip_suffix(b"\n").unwrap_or(content);
    text.strip_suffix(b"\r").unwrap_or(text)
}

/// Whether someone typed it. That 32 random bytes look so has a chance of less than 1 in 10^13.
fn is_text(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace())
}

/// The file `name` of `directory`; `None` where the name would lead elsewhere.
fn inside(directory: &Path, name: &str) -> Option<PathBuf> {
    let plain = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0']);
    plain.then(|| directory.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Reason, Reasoned};
    use std::os::unix::fs::PermissionsExt;

    const HEX: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

    fn counting() -> [u8; KEY_BYTES] {
        std::array::from_fn(|index| index as u8)
    }

    fn load_file(content: &[u8]) -> Result<RootKey, KeyError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("root.key");
        create_key_file(&path, content).unwrap();
        RootKey::load(&RootKeySource::File(path)).map(|(key, warning)| {
            assert!(warning.is_none());
            key
        })
    }

    fn load_variable(text: &str) -> Result<(RootKey, Option<String>), KeyError> {
        let value = Zeroizing::new(text.to_owned());
        RootKey::load(&RootKeySource::EnvironmentValue { name: "ROOT_KEY".to_owned(), value })
    }

    /// Computed apart from this program.
    #[test]
    fn the_id_is_a_truncated_mac_of_a_fixed_label() {
        assert_eq!(
            RootKey::from_bytes(&counting()).unwrap().id().to_string(),
            "89a87a262e63cd97051a13084209db9f"
        );
    }

    #[test]
    fn every_permitted_form_is_the_same_key() {
        let id = RootKeyId::of(&counting());
        let upper = HEX.to_uppercase();
        for content in [
            counting().as_slice(),
            HEX.as_bytes(),
            upper.as_bytes(),
            format!("{HEX}\n").as_bytes(),
            format!("{HEX}\r\n").as_bytes(),
        ] {
            assert_eq!(load_file(content).unwrap().id(), id);
        }
        assert_eq!(load_variable(HEX).unwrap().0.id(), id);
    }

    #[test]
    fn a_raw_key_may_end_in_a_newline_byte() {
        let mut bytes = counting();
        bytes[31] = b'\n';
        assert_eq!(load_file(&bytes).unwrap().id(), RootKeyId::of(&bytes));
    }

    #[test]
    fn each_fault_of_the_content_is_its_own() {
        let refused = |content: &[u8]| {
            let error = load_file(content).unwrap_err();
            assert_eq!(error.reason(), Reason::InvalidKey);
            error.problem().clone()
        };
        let bytes = counting();
        let bad_hex = format!("{}x{}", &HEX[..9], &HEX[10..]);
        assert_eq!(refused(b"\n"), KeyProblem::Empty);
        assert_eq!(refused(&bytes[..31]), KeyProblem::Length(31));
        assert_eq!(refused(&[bytes.as_slice(), b"\n"].concat()), KeyProblem::Length(33));
        assert_eq!(refused(&HEX.as_bytes()[..63]), KeyProblem::Length(63));
        assert_eq!(refused(bad_hex.as_bytes()), KeyProblem::NotHex { position: 10 });
        assert_eq!(refused(&[0; KEY_BYTES]), KeyProblem::Placeholder);
        assert_eq!(refused(&[0xff; KEY_BYTES]), KeyProblem::Placeholder);
        assert_eq!(refused("0".repeat(HEX_DIGITS).as_bytes()), KeyProblem::Placeholder);
        assert_eq!(refused(&HEX.as_bytes()[..32]), KeyProblem::Text);
        assert_eq!(refused(b"correct horse battery staple xkc"), KeyProblem::Text);
    }

    #[test]
    fn a_variable_holds_hex_alone_and_is_warned_of() {
        let (_, warning) = load_variable(HEX).unwrap();
        let warning = warning.unwrap();
        assert!(warning.contains("`ROOT_KEY`") && !warning.contains(HEX), "{warning}");
        let raw = "é".repeat(16);
        assert_eq!(*load_variable(&raw).unwrap_err().problem(), KeyProblem::Length(32));
        assert_eq!(
            load_variable("").unwrap_err().to_string(),
            "environment variable `ROOT_KEY`: is empty; remove it and create the key anew"
        );
    }

    #[test]
    fn a_credential_is_one_file_of_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("root-key");
        create_key_file(&path, HEX.as_bytes()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o440)).unwrap();
        let load = |name: &str| {
            let directory = folder.path().to_owned();
            RootKey::load(&RootKeySource::SystemdCredential { directory, name: name.to_owned() })
        };
        assert_eq!(load("root-key").unwrap().0.id(), RootKeyId::of(&counting()));
        for name in ["", ".", "..", "../root-key", "a/b", "a\0b"] {
            assert_eq!(*load(name).unwrap_err().problem(), KeyProblem::CredentialName, "{name:?}");
        }
        assert_eq!(*load("other").unwrap_err().problem(), KeyProblem::Missing);
    }

    #[test]
    fn a_generated_key_is_loaded_back_from_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("root.key");
        let key = RootKey::generate().unwrap();
        key.create_file(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 65);
        assert_eq!(RootKey::load(&RootKeySource::File(path)).unwrap().0.id(), key.id());
        assert_ne!(RootKey::generate().unwrap().id(), key.id());
    }

    #[test]
    fn nothing_shows_the_key() {
        let key = RootKey::from_bytes(&counting()).unwrap();
        assert_eq!(format!("{key:?}"), format!("RootKey([redacted], {})", key.id()));
        let value = Zeroizing::new(HEX.to_owned());
        let source = RootKeySource::EnvironmentValue { name: "ROOT_KEY".to_owned(), value };
        assert!(!format!("{source:?}").contains(HEX));
        let error = load_variable(&HEX.replace('f', "canary")).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("canary"));
    }
}
