//! Folders for this user alone.

use std::fs::{DirBuilder, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::Path;

use rustix::fs::{Access, StatVfsMountFlags, access, statvfs};

use super::assembly::StartError;
use crate::policy::PolicySource;

/// Makes a folder that others can't enter, where it is missing, and refuses one that they can.
pub(super) fn make_private(path: &Path) -> Result<(), StartError> {
    match DirBuilder::new().mode(0o700).recursive(false).create(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(refused(path, "can't be made, because the folder above it is missing; make that first"))
        }
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(refused(path, error.to_string())),
        _ => check_private(path),
    }
}

/// Refuses a folder that others can enter, and what is none.
pub(super) fn check_private(path: &Path) -> Result<(), StartError> {
    let found = std::fs::symlink_metadata(path).map_err(|error| refused(path, error.to_string()))?;
    problem_of(&found).map_or(Ok(()), |problem| Err(refused(path, problem)))
}

/// Whether this user can make `path` in the folder that it is to be in.
pub(super) fn can_make_in(path: &Path) -> Result<(), StartError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match access(folder, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) if folder.is_dir() => Ok(()),
        Ok(()) => Err(refused(path, "can't be made: what it is to be in is not a folder")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(refused(path, "can't be made, because the folder above it is missing; make that first"))
        }
        Err(error) => Err(refused(path, format!("can't be made in {}: {error}", folder.display()))),
    }
}

/// A line to warn of where others may write policies: whoever can, may give themselves everything.
pub(super) fn open_to_others(source: &PolicySource) -> Option<String> {
    let PolicySource::Directory(folder) = source else { return None };
    // What an orchestrator mounts read-only may have any mode.
    if statvfs(folder).is_ok_and(|found| found.f_flag.contains(StatVfsMountFlags::RDONLY)) {
        return None;
    }
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let open = [folder.clone()]
        .into_iter()
        .chain(files)
        .find(|path| std::fs::metadata(path).is_ok_and(|found| found.mode() & 0o022 != 0))?;
    Some(format!(
        "{}: group or others may write it, and so give themselves whatever they like; run `chmod go-w` on it",
        open.display()
    ))
}

fn problem_of(found: &Metadata) -> Option<String> {
    let ours = rustix::process::geteuid().as_raw();
    if !found.is_dir() {
        return Some("is not a folder, or a link to one; name the folder itself".to_owned());
    }
    if found.uid() != ours {
        return Some(format!(
            "belongs to uid {}, and this process is uid {ours}; run `chown` on it",
            found.uid()
        ));
    }
    let mode = found.mode() & 0o7777;
    (mode & 0o077 != 0).then(|| format!("mode {mode:04o} lets others in; run `chmod 0700` on it"))
}

fn refused(path: &Path, problem: impl Into<String>) -> StartError {
    StartError::Folder { path: path.display().to_string(), problem: problem.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn what_others_can_enter_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        make_private(&path).unwrap();
        make_private(&path).unwrap();
        for mode in [0o755, 0o710, 0o701, 0o777] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let error = make_private(&path).unwrap_err().to_string();
            assert!(error.contains(&format!("{mode:04o}")) && error.contains("chmod 0700"), "{error}");
        }
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path(), &link).unwrap();
        assert!(check_private(&link).unwrap_err().to_string().contains("name the folder itself"));
        let deep = make_private(&folder.path().join("a/b")).unwrap_err().to_string();
        assert!(deep.contains("folder above it"), "{deep}");
    }
}
