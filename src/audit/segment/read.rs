//! Bounded reading of segments, whatever stands in them.
//!
//! ```text
//!   line\n line\n … line\n                  the file's end
//!   line\n line\n … line\n 0 0 0 0 0 0      the end as well: zeros that were written ahead are no content
//!   line\n line\n … li 0 0 0 0 0 0          an unfinished line
//!   line\n li 0 0 0 e\n line\n 0 0 0        a line with a hole: damage, or what a crash left of a batch whose pages
//!                                           did not all reach the disk
//! ```
//!
//! A segment may be written to while it is read. Pages are filled in order, so whoever finds zeros and something behind
//! them has looked too early, and finds them filled at a second look; a hole that is still there is one.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::super::AuditError;
use super::super::chain::{Frame, MAX_LINE};
use super::{unavailable, unreadable, wide};

const READ_AT_ONCE: usize = 64 << 10;
/// How many bytes are looked at before the next decision whether they are all zeros.
const LOOK_AT_ONCE: usize = 4 << 10;
/// How often a line that is not whole is looked at, at most, while it changes.
const LOOKS: usize = 64;

/// A line with its newline, and a byte more to tell that it is too long.
pub(super) const LINE_LIMIT: u64 = MAX_LINE as u64 + 2;

/// How much a crash may leave behind the last whole line, in bytes. What is more is damage.
pub(in crate::audit) const MAX_TORN: u64 = 16 << 20;

/// Opens a segment for reading: neither a link nor something that blocks.
pub(super) fn open_to_read(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    Ok(file)
}

/// Brings a segment to the disk, whoever wrote it.
pub(in crate::audit) fn sync(path: &Path) -> Result<(), AuditError> {
    open_to_read(path).and_then(|file| file.sync_all()).map_err(|error| unavailable(path, &error))
}

/// What a segment holds from `offset` on, without the NULs at its end; `None` where that is more than [`MAX_TORN`].
pub(in crate::audit) fn torn(path: &Path, offset: u64) -> io::Result<Option<Vec<u8>>> {
    let file = open_to_read(path)?;
    let end = content_end(&file, offset)?;
    if end - offset > MAX_TORN { Ok(None) } else { part(&file, offset, end).map(Some) }
}

/// Where a file's content ends: `from`, or behind it. What follows are NULs up to the file's end. Reads from the end on.
pub(super) fn content_end(file: &File, from: u64) -> io::Result<u64> {
    let mut end = file.metadata()?.len();
    let mut block = vec![0; READ_AT_ONCE];
    while end > from {
        let start = end.saturating_sub(wide(READ_AT_ONCE)).max(from);
        let length = usize::try_from(end - start).unwrap_or(READ_AT_ONCE);
        let found = read_at_most(file, block.get_mut(..length).unwrap_or_default(), start)?;
        let found = block.get(..found).unwrap_or_default();
        if !is_blank(found)
            && let Some(last) = found.iter().rposition(|byte| *byte != 0)
        {
            return Ok(start + wide(last) + 1);
        }
        end = start;
    }
    Ok(from)
}

/// The bytes of a file in between.
pub(super) fn part(file: &File, from: u64, to: u64) -> io::Result<Vec<u8>> {
    let length = usize::try_from(to.saturating_sub(from)).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, from)?;
    Ok(bytes)
}

/// Fills `buffer` as far as the file goes: it may be cut meanwhile.
fn read_at_most(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut found = 0;
    while let Some(rest) = buffer.get_mut(found..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + wide(found)) {
            Ok(0) => break,
            Ok(read) => found += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

fn is_blank(bytes: &[u8]) -> bool {
    bytes.chunks(LOOK_AT_ONCE).all(|bytes| bytes.iter().fold(0_u8, |all, byte| all | *byte) == 0)
}

fn first_nul(bytes: &[u8]) -> Option<u64> {
    // Most have none, and this way of asking is the fast one.
    if bytes.contains(&0) { bytes.iter().position(|byte| *byte == 0).map(wide) } else { None }
}

/// A piece of a segment.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::audit) enum Chunk<'a> {
    /// A line, without its newline.
    Line(&'a [u8]),
    /// The content's end, without a newline: so many bytes.
    Torn(u64),
    /// A line longer than [`MAX_LINE`], skipped. May be the content's end. Whether a NUL is in it.
    TooLong { holed: bool },
}

impl Chunk<'_> {
    /// Whether what a crash leaves may begin with it: it is not finished, or it has a hole and is no record.
    pub(in crate::audit) fn is_torn(&self) -> bool {
        match self {
            Self::Line(line) => {
                line.contains(&0) && Frame::parse(line).is_none_or(|frame| !frame.is_authentic())
            }
            Self::Torn(_) => true,
            Self::TooLong { holed } => *holed,
        }
    }
}

/// Reads a segment line by line in bounded memory.
#[derive(Debug)]
pub(in crate::audit) struct LineReader {
    path: PathBuf,
    file: BufReader<File>,
    line: Vec<u8>,
    /// Where the piece that was read last begins and ends.
    start: u64,
    end: u64,
    /// Whether there is no other piece.
    is_over: bool,
}

/// What lies between two newlines, or behind the last one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Piece {
    /// In bytes with its newline, without NULs at the file's end. 0 at the content's end.
    length: u64,
    has_newline: bool,
    /// Where in it the first NUL stands.
    hole: Option<u64>,
}

impl Piece {
    const fn is_sound(&self) -> bool {
        self.hole.is_none() && (self.has_newline || self.length == 0)
    }
}

impl LineReader {
    pub(in crate::audit) fn open(path: &Path) -> Result<Self, AuditError> {
        let file = open_to_read(path).map_err(|error| unreadable(path, &error))?;
        Ok(Self {
            path: path.to_owned(),
            file: BufReader::with_capacity(READ_AT_ONCE, file),
            line: Vec::new(),
            start: 0,
            end: 0,
            is_over: false,
        })
    }

    /// The next piece; `None` at the content's end.
    pub(in crate::audit) fn read(&mut self) -> Result<Option<Chunk<'_>>, AuditError> {
        if self.is_over {
            return Ok(None);
        }
        self.start = self.end;
        let piece = self.look().map_err(|error| unreadable(&self.path, &error))?;
        self.end = self.start + piece.length;
        self.is_over = !piece.has_newline;
        Ok(match (piece.length, piece.has_newline) {
            (0, _) => None,
            (length, true) if length < LINE_LIMIT => {
                Some(Chunk::Line(self.line.strip_suffix(b"\n").unwrap_or(&self.line)))
            }
            (length, false) if length < LINE_LIMIT => Some(Chunk::Torn(length)),
            _ => Some(Chunk::TooLong { holed: piece.hole.is_some() }),
        })
    }

    /// How many bytes of content there are from the piece on that was read last.
    pub(in crate::audit) fn rest(&self) -> Result<u64, AuditError> {
        let end = content_end(self.file.get_ref(), self.start);
        end.map(|end| end - self.start).map_err(|error| unreadable(&self.path, &error))
    }

    /// Takes a piece as it is, not as it was while it was being written.
    fn look(&mut self) -> io::Result<Piece> {
        let mut piece = self.fill()?;
        for _ in 0..LOOKS {
            if piece.is_sound() {
                break;
            }
            self.file.seek(SeekFrom::Start(self.start))?;
            let again = self.fill()?;
            if again == piece {
                break;
            }
            piece = again;
        }
        Ok(piece)
    }

    /// Reads up to a newline, keeps no more than [`LINE_LIMIT`] bytes of it and skips the rest.
    fn fill(&mut self) -> io::Result<Piece> {
        self.line.clear();
        let blank = skip_blank(&mut self.file)?;
        if self.file.fill_buf()?.is_empty() {
            return Ok(Piece::default());
        }
        let kept = blank.min(LINE_LIMIT);
        self.line.resize(usize::try_from(kept).map_err(io::Error::other)?, 0);
        self.file.by_ref().take(LINE_LIMIT - kept).read_until(b'\n', &mut self.line)?;
        let length = blank - kept + wide(self.line.len());
        let hole = first_nul(&self.line);
        if self.line.ends_with(b"\n") {
            return Ok(Piece { length, has_newline: true, hole });
        }
        let rest = skip_line(&mut self.file)?;
        if rest.length > 0 {
            let hole = hole.or(rest.hole.map(|hole| length + hole));
            return Ok(Piece { length: length + rest.length, has_newline: rest.has_newline, hole });
        }
        let content = self.line.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        self.line.truncate(content);
        let length = wide(content);
        Ok(Piece { length, has_newline: false, hole: hole.filter(|hole| *hole < length) })
    }
}

/// Skips NULs, and says how many.
fn skip_blank(file: &mut BufReader<File>) -> io::Result<u64> {
    let mut skipped = 0;
    loop {
        let block = file.fill_buf()?;
        if block.first() != Some(&0) {
            return Ok(skipped);
        }
        let blank = if is_blank(block) { None } else { block.iter().position(|byte| *byte != 0) };
        let blank = blank.unwrap_or(block.len());
        skipped += wide(blank);
        file.consume(blank);
    }
}

/// Skips to behind the next newline, or to the end, and says what was there.
fn skip_line(file: &mut BufReader<File>) -> io::Result<Piece> {
    let mut rest = Piece::default();
    let mut skipped = 0;
    loop {
        let block = file.fill_buf()?;
        if block.is_empty() {
            rest.hole = rest.hole.filter(|hole| *hole < rest.length);
            return Ok(rest);
        }
        let newline = if is_blank(block) { None } else { block.iter().position(|byte| *byte == b'\n') };
        let length = newline.map_or(block.len(), |at| at + 1);
        let found = block.get(..length).unwrap_or(block);
        if !is_blank(found)
            && let Some(last) = found.iter().rposition(|byte| *byte != 0)
        {
            rest.length = skipped + wide(last) + 1;
        }
        rest.hole = rest.hole.or_else(|| first_nul(found).map(|hole| skipped + hole));
        skipped += wide(length);
        file.consume(length);
        if newline.is_some() {
            rest.has_newline = true;
            return Ok(rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// What a reader makes of a file, with the lines' lengths.
    fn pieces(bytes: &[u8]) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        fs::write(&path, bytes).unwrap();
        let mut lines = LineReader::open(&path).unwrap();
        let mut pieces = Vec::new();
        while let Some(chunk) = lines.read().unwrap() {
            pieces.push(match chunk {
                Chunk::Line(line) => format!("line {}", line.escape_ascii()),
                chunk => format!("{chunk:?}"),
            });
        }
        assert_eq!(lines.read().unwrap(), None, "an end stays one");
        pieces
    }

    #[test]
    fn lines_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        let longest = vec![b'x'; MAX_LINE];
        let mut text = b"a\n\n".to_vec();
        for line in [longest.clone(), vec![b'y'; MAX_LINE + 1], vec![b'z'; 3 * MAX_LINE], b"b".to_vec()] {
            text.extend_from_slice(&line);
            text.push(b'\n');
        }
        text.extend_from_slice(b"torn");
        fs::write(&path, &text).unwrap();
        let mut lines = LineReader::open(&path).unwrap();
        for expected in [
            Chunk::Line(b"a"),
            Chunk::Line(b""),
            Chunk::Line(&longest),
            Chunk::TooLong { holed: false },
            Chunk::TooLong { holed: false },
            Chunk::Line(b"b"),
            Chunk::Torn(4),
        ] {
            assert!(lines.read().unwrap() == Some(expected));
        }
        assert_eq!(lines.read().unwrap(), None);
    }

    #[test]
    fn zeros_up_to_the_end_are_the_end() {
        for zeros in [1, LOOK_AT_ONCE, READ_AT_ONCE + 1, MAX_LINE + 7, 5 << 20] {
            let zeros = vec![0_u8; zeros];
            assert_eq!(pieces(&zeros), [""; 0]);
            let behind = |text: &[u8]| pieces(&[text, &zeros[..]].concat());
            assert_eq!(behind(b"one\ntwo\n"), ["line one", "line two"]);
            assert_eq!(behind(b"one\ntw"), ["line one", "Torn(2)"]);
        }
    }

    #[test]
    fn zeros_in_front_of_anything_are_a_hole() {
        assert_eq!(pieces(b"one\n\0\0two\nthree\n\0"), ["line one", "line \\x00\\x00two", "line three"]);
        assert_eq!(pieces(b"o\0\0e\n\0\0tw\0\0"), ["line o\\x00\\x00e", "Torn(4)"]);
        let many = vec![0_u8; 3 << 20];
        let long = |before: &[u8], behind: &[u8]| pieces(&[before, &many[..], behind, &many[..]].concat());
        assert_eq!(long(b"one\n", b"two\nthree\n"), ["line one", "TooLong { holed: true }", "line three"]);
        assert_eq!(long(b"one\ntw", b"o\nthree\n"), ["line one", "TooLong { holed: true }", "line three"]);
        assert_eq!(long(b"one\n", b"two"), ["line one", "TooLong { holed: true }"]);
    }

    #[test]
    fn a_long_unfinished_line_ends_where_its_zeros_begin() {
        let of = |length: usize| pieces(&[vec![b'x'; length], vec![0; 2 << 20]].concat());
        assert_eq!(of(MAX_LINE), [format!("Torn({MAX_LINE})")]);
        assert_eq!(of(MAX_LINE + 9), ["TooLong { holed: false }"]);
    }

    #[test]
    fn only_what_a_crash_may_leave_is_torn() {
        for (chunk, torn) in [
            (Chunk::Line(b"hello"), false),
            (Chunk::Line(b"hel\0o"), true),
            (Chunk::Torn(3), true),
            (Chunk::TooLong { holed: false }, false),
            (Chunk::TooLong { holed: true }, true),
        ] {
            assert_eq!(chunk.is_torn(), torn, "{chunk:?}");
        }
    }

    #[test]
    fn what_is_behind_a_piece_is_counted_without_the_zeros_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        fs::write(&path, [&b"one\ntw\0o\nthree\n"[..], &[0; 200_000][..]].concat()).unwrap();
        let mut lines = LineReader::open(&path).unwrap();
        for rest in [15, 11, 6] {
            assert!(lines.read().unwrap().is_some());
            assert_eq!(lines.rest().unwrap(), rest);
        }
        assert_eq!(lines.read().unwrap(), None);
        assert_eq!(torn(&path, 4).unwrap().unwrap(), b"tw\0o\nthree\n");
        assert_eq!(torn(&path, 15).unwrap().unwrap(), b"");
    }

    #[test]
    fn more_than_a_crash_leaves_is_not_taken_into_memory() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        let file = File::create(&path).unwrap();
        file.write_all_at(b"x", MAX_TORN).unwrap();
        assert_eq!(torn(&path, 0).unwrap(), None);
        assert_eq!(torn(&path, 1).unwrap().unwrap().len(), MAX_TORN as usize);
        file.set_len(MAX_TORN).unwrap();
        assert_eq!(torn(&path, 0).unwrap().unwrap(), b"");
    }

    #[test]
    fn a_line_that_was_under_way_is_read_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        fs::write(&path, b"one\n\0\0\0\0three\n").unwrap();
        let mut lines = LineReader::open(&path).unwrap();
        assert_eq!(lines.read().unwrap(), Some(Chunk::Line(b"one")));
        // What the reader holds in memory is as it was before this.
        OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"two\n", 4).unwrap();
        assert_eq!(lines.read().unwrap(), Some(Chunk::Line(b"two")));
        assert_eq!(lines.read().unwrap(), Some(Chunk::Line(b"three")));
        assert_eq!(lines.read().unwrap(), None);
    }
}
