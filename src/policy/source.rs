//! Where policies come from: a folder, or texts in memory. Reads within bounds and knows positions; understands nothing.
//!
//! ```text
//! policies/
//!   schema.cedarschema     what policies can see of a request
//!   *.cedar                policies, one file per concern
//!   tests/*.toml           expected decisions
//! ```

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{PolicyError, bounds};

const SCHEMA: &str = "schema.cedarschema";
const TESTS: &str = "tests";
/// The largest file, in bytes. Ten thousand policies fit several times over.
const MAX_FILE_BYTES: u64 = 1024 * 1024;
/// The most files in one folder that are looked at.
const MAX_FILES: usize = 512;

macro_rules! texts {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/policies/", $name)))),+]
    };
}

/// The shipped set by file name: the schema and the policies.
pub const SHIPPED: &[(&str, &str)] = texts![
    "schema.cedarschema",
    "administrators.cedar",
    "auditors.cedar",
    "break-glass.cedar",
    "ci.cedar",
    "development.cedar",
    "preview.cedar",
    "production.cedar",
    "rotation.cedar",
    "services.cedar",
    "staging.cedar",
];

const SHIPPED_TESTS: &[(&str, &str)] = texts!["tests/matrix.toml"];

/// Where policies come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicySource {
    /// A folder with `schema.cedarschema`, `*.cedar` and, under `tests/`, `*.toml`. Other folders in it, hidden files
    /// and `*.md` are left alone; symbolic links are followed, as Kubernetes mounts need.
    Directory(PathBuf),
    /// The same, as pairs of file name and text.
    Texts(Vec<(String, String)>),
}

impl PolicySource {
    /// The shipped set with its expected decisions.
    #[must_use]
    pub fn shipped() -> Self {
        let texts = SHIPPED.iter().chain(SHIPPED_TESTS);
        Self::Texts(texts.map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect())
    }

    /// Reads the schema and the policies.
    pub(super) fn policies(&self) -> Result<PolicyFiles, PolicyError> {
        let (mut schema, mut policies, mut warnings) = (None, Vec::new(), Vec::new());
        for found in self.find(Part::Policies)? {
            match found.name.as_str() {
                SCHEMA => schema = Some(found.read()?),
                name if name.starts_with('.') || name == TESTS || name.ends_with(".md") => {}
                name if name.ends_with(".cedar") => policies.push(found.read()?),
                _ => warnings
                    .push(format!("{}: ignored; the name of a policy file ends in `.cedar`", found.path())),
            }
        }
        let place = self.place();
        let schema = schema.ok_or_else(|| PolicyError::Unreadable {
            path: place.clone(),
            problem: format!("there is no `{SCHEMA}` in it; copy the shipped one"),
        })?;
        if policies.is_empty() {
            return Err(PolicyError::Empty { place });
        }
        policies.iter().chain([&schema]).try_for_each(bounds::check)?;
        Ok(PolicyFiles { place, schema, policies, warnings })
    }

    /// Reads the expected decisions.
    pub(super) fn expectations(&self) -> Result<Vec<SourceFile>, PolicyError> {
        let found = self.find(Part::Expectations)?;
        found
            .into_iter()
            .filter(|found| !found.name.starts_with('.') && found.name.ends_with(".toml"))
            .map(Found::read)
            .collect()
    }

    /// Where this is, for messages.
    pub(super) fn place(&self) -> String {
        match self {
            Self::Directory(folder) => one_line(&folder.display().to_string()),
            Self::Texts(_) => "the policies in memory".to_owned(),
        }
    }

    /// What there is, in the order of the names, so that messages and ids come the same way each time.
    fn find(&self, part: Part) -> Result<Vec<Found<'_>>, PolicyError> {
        let mut found: Vec<Found<'_>> = match self {
            Self::Directory(folder) => {
                let folder = part.folder(folder);
                let names = names_in(&folder)?;
                names
                    .into_iter()
                    .map(|name| Found { content: Content::File(folder.join(&name)), name })
                    .collect()
            }
            Self::Texts(texts) => texts
                .iter()
                .filter_map(|(path, text)| {
                    let name = part.name(path)?.to_owned();
                    Some(Found { name, content: Content::Text { path, text } })
                })
                .collect(),
        };
        found.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(found)
    }
}

/// Which of the files.
#[derive(Clone, Copy)]
enum Part {
    Policies,
    Expectations,
}

impl Part {
    fn folder(self, folder: &Path) -> PathBuf {
        match self {
            Self::Policies => folder.to_owned(),
            Self::Expectations => folder.join(TESTS),
        }
    }

    /// The name within this part's folder, where the file belongs to it.
    fn name(self, name: &str) -> Option<&str> {
        let tested = name.strip_prefix(TESTS).and_then(|rest| rest.strip_prefix('/'));
        match self {
            Self::Policies => tested.is_none().then_some(name),
            Self::Expectations => tested,
        }
    }
}

fn names_in(folder: &Path) -> Result<Vec<String>, PolicyError> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|cause| unreadable(folder, &cause))? {
        let entry = entry.map_err(|cause| unreadable(folder, &cause))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
        if names.len() > MAX_FILES {
            let problem = format!("holds more than {MAX_FILES} files; give policies a folder of their own");
            return Err(PolicyError::Unreadable { path: shown(folder), problem });
        }
    }
    Ok(names)
}

/// A file that was found and not yet read.
struct Found<'a> {
    name: String,
    content: Content<'a>,
}

enum Content<'a> {
    File(PathBuf),
    Text { path: &'a str, text: &'a str },
}

impl Found<'_> {
    fn path(&self) -> String {
        match &self.content {
            Content::File(path) => shown(path),
            Content::Text { path, .. } => one_line(path),
        }
    }

    fn read(self) -> Result<SourceFile, PolicyError> {
        let path = self.path();
        let text = match self.content {
            Content::File(path) => read_file(&path)?,
            Content::Text { text, .. } => text.to_owned(),
        };
        Ok(SourceFile { name: one_line(&self.name).into(), path, text })
    }
}

fn read_file(path: &Path) -> Result<String, PolicyError> {
    let refuse = |problem: String| PolicyError::Unreadable { path: shown(path), problem };
    // Looked at before it is opened, because opening a FIFO waits for its other end.
    let metadata = std::fs::metadata(path).map_err(|cause| unreadable(path, &cause))?;
    if !metadata.is_file() {
        return Err(refuse("is not a regular file; put the policy text there".to_owned()));
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|cause| unreadable(path, &cause))?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_FILE_BYTES) {
        return Err(refuse(format!("is larger than {MAX_FILE_BYTES} bytes; split it by concern")));
    }
    String::from_utf8(bytes).map_err(|error| {
        let position = error.utf8_error().valid_up_to() + 1;
        refuse(format!("byte {position} is not UTF-8; save the file as UTF-8"))
    })
}

fn unreadable(path: &Path, cause: &std::io::Error) -> PolicyError {
    let problem = format!("{cause}; check that it exists and that the broker may read it");
    PolicyError::Unreadable { path: shown(path), problem }
}

fn shown(path: &Path) -> String {
    one_line(&path.display().to_string())
}

/// What [`PolicySource::policies`] read.
pub(super) struct PolicyFiles {
    pub(super) place: String,
    pub(super) schema: SourceFile,
    pub(super) policies: Vec<SourceFile>,
    pub(super) warnings: Vec<String>,
}

/// One file's text, with what it takes to say where in it something stands.
pub(super) struct SourceFile {
    /// The file's name within its folder.
    pub(super) name: Arc<str>,
    path: String,
    pub(super) text: String,
}

impl SourceFile {
    /// `path:line:column` of a byte offset; both counted from 1, columns in characters.
    pub(super) fn place(&self, offset: usize) -> String {
        self.places().at(offset)
    }

    /// The places of offsets that come in ascending order.
    pub(super) const fn places(&self) -> Places<'_> {
        Places { file: self, offset: 0, line: 1, column: 1 }
    }

    /// Something in this file is not right.
    pub(super) fn invalid(&self, offset: usize, problem: &str) -> PolicyError {
        PolicyError::Invalid { place: self.place(offset), problem: one_line(problem) }
    }
}

/// Goes through a file: a place costs the way from the one before, not the way from the file's beginning.
pub(super) struct Places<'a> {
    file: &'a SourceFile,
    /// Where it stands.
    offset: usize,
    line: usize,
    column: usize,
}

impl Places<'_> {
    /// `path:line:column` of a byte offset that is not before the last one; of one behind the end, that of the end.
    pub(super) fn at(&mut self, offset: usize) -> String {
        let text = self.file.text.as_str();
        let passed = text.get(self.offset..offset).or_else(|| text.get(self.offset..)).unwrap_or_default();
        match passed.rsplit_once('\n') {
            Some((lines, last)) => {
                self.line += lines.matches('\n').count() + 1;
                self.column = last.chars().count() + 1;
            }
            None => self.column += passed.chars().count(),
        }
        self.offset += passed.len();
        format!("{}:{}:{}", self.file.path, self.line, self.column)
    }
}

/// Fits a message on one line of a log: control characters become spaces, runs of them one, and what is long is cut.
pub(super) fn one_line(text: &str) -> String {
    const MOST: usize = 400;
    let words: Vec<&str> =
        text.split(|c: char| c.is_control() || c == ' ').filter(|word| !word.is_empty()).collect();
    let line = words.join(" ");
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", line.get(..end).unwrap_or_default()),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Reason, Reasoned};

    fn texts(files: &[(&str, &str)]) -> PolicySource {
        PolicySource::Texts(
            files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect(),
        )
    }

    #[test]
    fn everything_under_policies_is_shipped() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies");
        let on_disk = PolicySource::Directory(folder);
        let in_memory = PolicySource::shipped();
        let names = |files: &[SourceFile]| files.iter().map(|file| file.name.to_string()).collect::<Vec<_>>();
        let (disk, memory) = (on_disk.policies().unwrap(), in_memory.policies().unwrap());
        assert_eq!(names(&disk.policies), names(&memory.policies));
        assert_eq!(disk.schema.text, memory.schema.text);
        assert_eq!(disk.warnings, memory.warnings);
        assert_eq!(names(&on_disk.expectations().unwrap()), names(&in_memory.expectations().unwrap()));
    }

    #[test]
    fn a_source_needs_a_schema_and_a_policy() {
        let error = texts(&[("a.cedar", "")]).policies().err().unwrap();
        assert!(error.to_string().contains("schema.cedarschema"), "{error}");
        assert_eq!(error.reason(), Reason::InvalidPolicy);
        let error =
            texts(&[(SCHEMA, ""), ("tests/a.toml", ""), ("notes.md", ""), (".b.cedar", "")]).policies().err();
        assert!(matches!(error, Some(PolicyError::Empty { .. })), "{error:?}");
    }

    #[test]
    fn what_looks_like_a_misspelt_policy_file_is_pointed_out() {
        let files =
            texts(&[(SCHEMA, ""), ("a.cedar", ""), ("b.ceder", ""), ("c.cedar~", "")]).policies().unwrap();
        assert_eq!(files.warnings.len(), 2, "{:?}", files.warnings);
        assert_eq!(files.policies.len(), 1);
    }

    #[test]
    fn files_are_bounded_and_text() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
        let source = PolicySource::Directory(folder.path().to_owned());
        put(SCHEMA, b"");
        put("a.cedar", &vec![b' '; usize::try_from(MAX_FILE_BYTES).unwrap()]);
        assert!(source.policies().is_ok());
        put("a.cedar", &vec![b' '; usize::try_from(MAX_FILE_BYTES).unwrap() + 1]);
        assert!(source.policies().err().unwrap().to_string().contains("a.cedar: is larger than"));
        put("a.cedar", b"// caf\xe9");
        assert!(source.policies().err().unwrap().to_string().contains("a.cedar: byte 7 is not UTF-8"));
        std::fs::remove_file(folder.path().join("a.cedar")).unwrap();
        std::fs::create_dir(folder.path().join("a.cedar")).unwrap();
        assert!(source.policies().err().unwrap().to_string().contains("a.cedar: is not a regular file"));
    }

    #[test]
    fn places_count_lines_and_characters() {
        let file = SourceFile { name: "a".into(), path: "p/a".to_owned(), text: "é\nab€c".to_owned() };
        assert_eq!(file.place(0), "p/a:1:1");
        assert_eq!(file.place(2), "p/a:1:2");
        assert_eq!(file.place(3), "p/a:2:1");
        assert_eq!(file.place(8), "p/a:2:4");
        assert_eq!(file.place(9_999), "p/a:2:5");
        let mut places = file.places();
        for (offset, place) in
            [(0, "p/a:1:1"), (2, "p/a:1:2"), (3, "p/a:2:1"), (3, "p/a:2:1"), (8, "p/a:2:4")]
        {
            assert_eq!(places.at(offset), place);
        }
        assert_eq!(places.at(9_999), "p/a:2:5");
    }

    #[test]
    fn messages_fit_on_one_line() {
        assert_eq!(one_line("a\n\t b\r\u{1b}[31m"), "a b [31m");
        assert_eq!(one_line(&"x".repeat(900)).chars().count(), 401);
    }
}
