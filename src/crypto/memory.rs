//! Memory for keys, and what the process does against being dumped. The one module with unsafe code.
//!
//! ```text
//! mmap ─▶ [ T │ zeros to the page's end ]   mlock: not written to swap   MADV_DONTDUMP: not in a core dump
//! drop ─▶ T's own drop, every byte wiped, munmap (which unlocks)
//! ```
//!
//! Each key has a mapping of its own because both calls work on whole pages: in a page shared with others, the first
//! key to go would unlock its neighbours.

#![allow(unsafe_code, reason = "what is said of pages has no safe interface; this module offers one")]

use std::alloc::{Layout, handle_alloc_error};
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ops::Deref;
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::mm::{self, Advice, MapFlags, ProtFlags};
use rustix::param::page_size;
use rustix::process::{self, DumpableBehavior, Resource, Rlimit};
use zeroize::Zeroize;

/// The smallest page of any Linux; a page is aligned to its size.
const SMALLEST_PAGE: usize = 4_096;

/// Sets the process's dumpable flag to 0 (no core dump, no `ptrace` by its own user) and its core size limit to 0.
/// Both last for the life of the process; the limit also passes to its children. The flag is back after `execve`.
///
/// Returns what could not be done, a line each, for the caller to warn of.
#[must_use]
pub fn harden_process() -> Vec<String> {
    let dumpable = process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|error| format!("the process stays dumpable (PR_SET_DUMPABLE: {error})"));
    let core = process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .map_err(|error| format!("the process may leave a core dump (RLIMIT_CORE: {error})"));
    [dumpable, core].into_iter().filter_map(Result::err).collect()
}

/// Lets go of the pages that hold code: what the start alone needed no longer counts as this process's memory, and what is
/// needed again is mapped again when it is called, from the page cache. Gives how many bytes were let go of at most; 0 where
/// the kernel does not say what is mapped.
pub fn let_go_of_code() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let code = maps.lines().filter_map(code_of);
    code.filter(|(at, length)| {
        // SAFETY: the range is a private mapping of a file, which can't be written to, so every page of it is as it is in
        // the file, and reads the same when it is mapped again (madvise(2), MADV_DONTNEED).
        unsafe { mm::madvise(ptr::with_exposed_provenance_mut(*at), *length, Advice::LinuxDontNeed) }.is_ok()
    })
    .map(|(_, length)| length)
    .sum()
}

/// Where a line of `/proc/PID/maps` (proc_pid_maps(5)) says that code of a file is mapped, and how long it is.
fn code_of(line: &str) -> Option<(usize, usize)> {
    let mut words = line.split_ascii_whitespace();
    let (range, permissions) = (words.next()?, words.next()?);
    let (inode, path) = (words.nth(2)?, words.next()?);
    if permissions != "r-xp" || inode == "0" || !path.starts_with('/') {
        return None;
    }
    let (from, to) = range.split_once('-')?;
    let (from, to) = (usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?);
    Some((from, to.checked_sub(from)?))
}

/// Overwrites the part of the stack that the functions just called have used: a key that is moved or returned by value
/// leaves copies there, which nothing wipes. Called by whoever called them, so that its frame lies where theirs lay.
#[inline(never)]
pub(super) fn wipe_stack_below() {
    const USED: usize = 64 * 1024;
    let mut room = [0_u8; USED];
    room.zeroize();
    std::hint::black_box(&room);
}

/// A value in locked pages of its own, wiped when it goes. Reads as the value.
///
/// Locking is best effort: what failed is in [`shortfalls`](Self::shortfalls).
pub(super) struct Locked<T> {
    at: NonNull<T>,
    /// Of the mapping, in bytes: whole pages.
    length: usize,
    shortfalls: Vec<String>,
}

// SAFETY: the mapping belongs to this value alone and is reached only through it, as a Box's allocation is.
unsafe impl<T: Send> Send for Locked<T> {}
// SAFETY: as above; a shared reference gives shared references to the value and nothing else.
unsafe impl<T: Sync> Sync for Locked<T> {}

impl<T> Locked<T> {
    /// Moves `value` into pages of its own. The bytes that it was moved from are the caller's to wipe.
    pub(super) fn new(value: T) -> Self {
        const { assert!(align_of::<T>() <= SMALLEST_PAGE && size_of::<T>() > 0) };
        let length = size_of::<T>().next_multiple_of(page_size());
        // A page that can't be had is memory that can't be had: the process ends as it would for a Box.
        let pages = map(length).unwrap_or_else(|_| handle_alloc_error(Layout::new::<T>()));
        let shortfalls = protect(pages, length);
        let at = pages.cast::<T>();
        // SAFETY: the mapping is fresh, writable, page-aligned, and at least as long as a T.
        unsafe { at.write(value) };
        Self { at, length, shortfalls }
    }

    /// What could not be done to protect the value, a line each.
    pub(super) fn shortfalls(&self) -> &[String] {
        &self.shortfalls
    }

    /// Overwrites the whole mapping with zeros.
    ///
    /// # Safety
    /// Afterwards the value must not be used, unless all zeros are a valid `T`.
    unsafe fn wipe(&mut self) {
        let start = self.at.as_ptr().cast::<MaybeUninit<u8>>();
        // SAFETY: the mapping is `length` bytes long, writable, and borrowed by nobody else.
        unsafe { std::slice::from_raw_parts_mut(start, self.length) }.zeroize();
    }
}

impl<T> Deref for Locked<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `new` wrote a T there, and it stays until the drop.
        unsafe { self.at.as_ref() }
    }
}

impl<T> Drop for Locked<T> {
    fn drop(&mut self) {
        // SAFETY: the value is valid, dropped once, and not used again.
        unsafe {
            self.at.drop_in_place();
            self.wipe();
        }
        // SAFETY: the mapping is this value's own, and no reference into it outlives the drop. There is nothing to
        // do about an error: the bytes are wiped.
        let _ = unsafe { mm::munmap(self.at.as_ptr().cast(), self.length) };
    }
}

fn map(length: usize) -> Result<NonNull<c_void>, Errno> {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: without a wish for an address, the kernel picks one that nothing else uses.
    let pages = unsafe { mm::mmap_anonymous(ptr::null_mut(), length, protection, MapFlags::PRIVATE) }?;
    NonNull::new(pages).ok_or(Errno::NOMEM)
}

fn protect(pages: NonNull<c_void>, length: usize) -> Vec<String> {
    // SAFETY: the range is one mapping that the caller owns, and locking does not touch its contents.
    let locked = unsafe { mm::mlock(pages.as_ptr(), length) }
        .map_err(|error| format!("a key may be written to swap (mlock: {error}); raise RLIMIT_MEMLOCK"));
    // SAFETY: as above; this advice is about core dumps alone.
    let undumped = unsafe { mm::madvise(pages.as_ptr(), length, Advice::LinuxDontDump) }
        .map_err(|error| format!("a key may be in a core dump (MADV_DONTDUMP: {error})"));
    [locked, undumped].into_iter().filter_map(Result::err).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_let_go_of_and_runs_on() {
        assert!(let_go_of_code() > 0);
        assert!(let_go_of_code() > 0, "it is mapped again where it is called");
    }

    #[test]
    fn nothing_but_code_of_a_file_is_let_go_of() {
        let code = "7f1000-7f3000 r-xp 00002000 fe:00 1234   /usr/bin/claviger";
        assert_eq!(code_of(code), Some((0x7f_1000, 0x2000)));
        for other in [
            "7f1000-7f3000 rw-p 00002000 fe:00 1234 /usr/bin/claviger",
            "7f1000-7f3000 r--p 00002000 fe:00 1234 /usr/bin/claviger",
            "7f1000-7f3000 rwxp 00002000 fe:00 1234 /usr/bin/claviger",
            "7f1000-7f3000 r-xs 00002000 fe:00 1234 /usr/bin/claviger",
            "7f1000-7f3000 r-xp 00000000 00:00 0",
            "7ffd1000-7ffd3000 r-xp 00000000 00:00 0 [vdso]",
            "7f1000 r-xp 00002000 fe:00 1234 /usr/bin/claviger",
            "",
        ] {
            assert_eq!(code_of(other), None, "{other}");
        }
    }
    use std::process::Command;

    #[test]
    fn a_value_is_read_back_and_wiped() {
        let mut locked = Locked::new([0xa5_u8; 32]);
        assert_eq!(*locked, [0xa5; 32]);
        // SAFETY: zeros are a valid array.
        unsafe { locked.wipe() };
        assert_eq!(*locked, [0; 32]);
    }

    #[test]
    fn the_value_itself_is_dropped_once() {
        let shared = std::sync::Arc::new(());
        let locked = Locked::new(std::sync::Arc::clone(&shared));
        assert_eq!(std::sync::Arc::strong_count(&shared), 2);
        drop(locked);
        assert_eq!(std::sync::Arc::strong_count(&shared), 1);
    }

    #[test]
    fn a_value_longer_than_a_page_fits() {
        let locked = Locked::new([7_u8; 3 * SMALLEST_PAGE + 1]);
        assert!(locked.iter().all(|byte| *byte == 7));
        assert_eq!(locked.length % page_size(), 0);
    }

    /// The kernel's own word on the page: `lo` locked, `dd` left out of dumps (`proc_pid_smaps(5)`).
    #[test]
    fn the_kernel_says_that_the_page_is_locked_and_not_dumped() {
        let locked = Locked::new([1_u8; 32]);
        let address = locked.at.as_ptr() as usize;
        let Some(flags) = flags_of_the_mapping_at(address) else { return };
        let says = |problem: &str| locked.shortfalls().iter().any(|line| line.contains(problem));
        assert!(flags.contains(&"lo".to_owned()) || says("mlock"), "{flags:?}");
        assert!(flags.contains(&"dd".to_owned()) || says("MADV_DONTDUMP"), "{flags:?}");
    }

    /// `None` where the kernel keeps no such flags.
    fn flags_of_the_mapping_at(address: usize) -> Option<Vec<String>> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").ok()?;
        let mut lines = smaps.lines().skip_while(|line| !covers(line, address));
        let flags = lines.find_map(|line| line.strip_prefix("VmFlags:"))?;
        Some(flags.split_whitespace().map(str::to_owned).collect())
    }

    fn covers(line: &str, address: usize) -> bool {
        let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
        let bound = |text| usize::from_str_radix(text, 16).ok();
        range.and_then(|(from, to)| Some(bound(from)? <= address && address < bound(to)?)).unwrap_or(false)
    }

    /// In a process of its own, because what is switched off stays off.
    #[test]
    fn a_hardened_process_leaves_no_core_dump() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", "crypto::memory::tests::hardened"])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }

    #[test]
    #[ignore = "run by a_hardened_process_leaves_no_core_dump, in a process of its own"]
    fn hardened() {
        assert_eq!(harden_process(), Vec::<String>::new());
        assert_eq!(process::dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
        assert_eq!(process::getrlimit(Resource::Core), Rlimit { current: Some(0), maximum: Some(0) });
    }
}
