//! Files of certificates and keys, read with an eye on who may write them and, of a key, who may read it.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use ring::digest;
use rustix::fs::{Mode, OFlags};
use zeroize::Zeroizing;

use super::TlsError;

/// The largest file that is read: a bundle of a few hundred authorities.
const LARGEST: u64 = 1024 * 1024;

/// Tells one set of files from another.
pub(super) type Digest = [u8; 32];

/// Files that belong together, as they are.
pub(super) struct Files<const N: usize>(pub(super) [Zeroizing<Vec<u8>>; N]);

impl<const N: usize> Files<N> {
    pub(super) fn digest(&self) -> Digest {
        let mut context = digest::Context::new(&digest::SHA256);
        for file in &self.0 {
            context.update(&u64::try_from(file.len()).unwrap_or(u64::MAX).to_be_bytes());
            context.update(file);
        }
        let mut digest = [0; 32];
        digest.iter_mut().zip(context.finish().as_ref()).for_each(|(to, from)| *to = *from);
        digest
    }
}

/// Reads a file whose owner and mode `problem` finds nothing wrong with. Symbolic links are followed, because that is
/// how Kubernetes and certbot replace certificates; what is looked at is the open file.
pub(super) fn read(
    what: &'static str,
    path: &Path,
    problem: fn(owner: u32, mode: u32) -> Option<String>,
) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    let refuse = |problem: String| TlsError::new(what, path, problem);
    // Without O_NONBLOCK the open of a FIFO would wait for a writer; without O_NOCTTY that of a terminal would adopt it.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|error| refuse(format!("can't be opened: {}", io::Error::from(error))))?;
    let file = File::from(file);
    let found = file.metadata().map_err(|error| refuse(format!("can't be read: {error}")))?;
    if !found.is_file() {
        return Err(refuse("is not a regular file; correct the path".to_owned()));
    }
    if found.len() > LARGEST {
        return Err(refuse(format!("holds more than {LARGEST} bytes; correct the path")));
    }
    if let Some(problem) = problem(found.uid(), found.mode() & 0o7777) {
        return Err(refuse(problem));
    }
    // Room for all of it at once: a buffer that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(found.len() + 1).unwrap_or(0)));
    file.take(LARGEST).read_to_end(&mut bytes).map_err(|error| refuse(format!("can't be read: {error}")))?;
    Ok(bytes)
}

/// A key is its owner's alone. Where root owns it, one group may read it too: so do Kubernetes (`fsGroup`), Debian
/// (`ssl-cert`) and systemd hand a key to a service.
pub(super) fn key_problem(owner: u32, mode: u32) -> Option<String> {
    let ours = rustix::process::geteuid().as_raw();
    let permitted = if owner == 0 { 0o640 } else { 0o600 };
    if owner != ours && owner != 0 {
        Some(format!(
            "is owned by uid {owner}, but must be owned by uid {ours} or by root; run `chown` on it"
        ))
    } else if mode & !permitted != 0 {
        Some(format!(
            "has mode {mode:04o}, but a key is for its owner alone, or root's and readable by one group; run `chmod \
             0600` on it, or in Kubernetes set `defaultMode: 0440` and an `fsGroup`"
        ))
    } else {
        None
    }
}

/// Whoever may write the authorities decides who is trusted.
pub(super) fn public_problem(_: u32, mode: u32) -> Option<String> {
    (mode & 0o002 != 0).then(|| format!("has mode {mode:04o}: anyone may write it; run `chmod o-w` on it"))
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::Folder;
    use super::*;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    #[test]
    fn files_that_others_may_write_or_keys_that_they_may_read_are_refused() {
        let folder = Folder::new();
        for (name, mode) in [("tls.key", 0o644), ("tls.key", 0o604), ("tls.crt", 0o646), ("ca.crt", 0o666)] {
            let path = folder.path(name);
            let before = std::fs::metadata(&path).unwrap().permissions();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert!(folder.refused().contains("chmod"), "{name} {mode:o}: {}", folder.refused());
            std::fs::set_permissions(&path, before).unwrap();
        }
        assert!(key_problem(0, 0o440).is_none() && key_problem(0, 0o640).is_none());
        assert!(key_problem(0, 0o660).is_some());
        let stranger = rustix::process::geteuid().as_raw() + 1;
        assert!(key_problem(stranger, 0o600).unwrap().contains("owned by"));
    }

    #[test]
    fn links_are_followed_as_kubernetes_makes_them() {
        let folder = Folder::new();
        std::fs::create_dir(folder.path("..one")).unwrap();
        std::fs::rename(folder.path("tls.key"), folder.path("..one/tls.key")).unwrap();
        symlink("..one", folder.path("..data")).unwrap();
        symlink("..data/tls.key", folder.path("tls.key")).unwrap();
        folder.load().unwrap();
        std::fs::remove_file(folder.path("tls.key")).unwrap();
        std::fs::create_dir(folder.path("tls.key")).unwrap();
        assert!(folder.refused().contains("not a regular file"), "{}", folder.refused());
    }
}
