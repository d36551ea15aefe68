//! The application's manifest, `claviger.toml`: which variables it needs and where each comes from.
//!
//! ```toml
//! [env]
//! DB_PASSWORD = "database#password"                      # a reference
//! JWT_SECRET  = { ref = "jwt#secret", min_length = 32 }  # a reference with conditions
//! LOG_LEVEL   = { value = "info" }                       # a literal
//!
//! [environments.development]                             # replaces entries by name, or adds them
//! LOG_LEVEL   = { value = "debug" }
//! ```
//!
//! A manifest that parses is right as a whole, every overlay included. One that doesn't gives all its faults at once.
//! The text of a value is never shown in one: a reference that doesn't parse may well be a password in the wrong place.

mod reader;

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read as _;
use std::path::Path;

use self::reader::Fault;
use super::name::VariableName;
use super::one_line;
use crate::error::{Reason, Reasoned};
use crate::secret::{EnvironmentName, Reference, SecretValue};

/// The largest manifest, in bytes (1 MiB).
pub const MAX_MANIFEST_BYTES: usize = 1 << 20;
/// How many faults are told one by one; what follows is counted.
const MAX_PROBLEMS: usize = 50;

/// A manifest that was checked as a whole.
#[derive(Debug, Clone)]
pub struct Manifest {
    variables: Vec<Variable>,
    overlays: BTreeMap<EnvironmentName, Vec<Variable>>,
}

/// One variable that the application needs.
#[derive(Debug, Clone)]
pub struct Variable {
    /// Its name.
    pub name: VariableName,
    /// Where its value comes from.
    pub source: VariableSource,
    /// The manifest's line that says so, 1-based.
    pub line: usize,
}

/// Where a variable's value comes from.
#[derive(Debug, Clone)]
pub enum VariableSource {
    /// From a secret.
    Reference {
        /// Which secret, and which field of it.
        reference: Reference,
        /// The fewest characters (not bytes) that the value may have.
        min_length: Option<usize>,
        /// Whether the value may be empty.
        allow_empty: bool,
    },
    /// From the manifest itself. Kept like a secret, because people do write secrets there.
    Literal(SecretValue),
}

impl Manifest {
    /// Reads and parses a file of at most [`MAX_MANIFEST_BYTES`].
    ///
    /// # Errors
    /// [`ManifestError`].
    pub fn load(path: &Path) -> Result<Self, ManifestError> {
        let file_name = path.display().to_string();
        let unreadable =
            |problem: String| ManifestError::Unreadable { file_name: one_line(&file_name), problem };
        let mut bytes = Vec::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_MANIFEST_BYTES as u64 + 1).read_to_end(&mut bytes))
            .map_err(|error| unreadable(format!("can't be read ({error}); name a manifest with `-m`")))?;
        if bytes.len() > MAX_MANIFEST_BYTES {
            return Err(unreadable(too_large()));
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            let position = error.utf8_error().valid_up_to() + 1;
            unreadable(format!("is not UTF-8 at byte {position}; save it as UTF-8"))
        })?;
        Self::parse(&text, &file_name)
    }

    /// Parses a manifest; `file_name` is what errors call it. A byte order mark at the start is skipped.
    ///
    /// # Errors
    /// [`ManifestError`], with every fault.
    pub fn parse(text: &str, file_name: &str) -> Result<Self, ManifestError> {
        let file_name = one_line(file_name);
        if text.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestError::Unreadable { file_name, problem: too_large() });
        }
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        reader::read(text).map_err(|faults| {
            let more = faults.len().saturating_sub(MAX_PROBLEMS);
            let lines = Lines::new(text);
            let problems = faults.into_iter().take(MAX_PROBLEMS).map(|fault| lines.locate(fault)).collect();
            ManifestError::Invalid { file_name, problems, more }
        })
    }

    /// The variables for one environment in the order of the file: those of `[env]`, each replaced where the
    /// environment's overlay has one of its name, then those that only the overlay has.
    #[must_use]
    pub fn variables_for(&self, environment: &EnvironmentName) -> Vec<Variable> {
        let overlay = self.overlays.get(environment).map(Vec::as_slice).unwrap_or_default();
        let mut unused: BTreeMap<&VariableName, &Variable> =
            overlay.iter().map(|variable| (&variable.name, variable)).collect();
        let mut variables: Vec<Variable> = self
            .variables
            .iter()
            .map(|variable| unused.remove(&variable.name).unwrap_or(variable).clone())
            .collect();
        variables.extend(overlay.iter().filter(|variable| unused.contains_key(&variable.name)).cloned());
        variables
    }
}

fn too_large() -> String {
    format!("is larger than {MAX_MANIFEST_BYTES} bytes; a manifest names variables, it doesn't hold data")
}

/// Why a manifest is not usable. Its text has one line per fault, `FILE:LINE:COLUMN: NAME: what; mend`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ManifestError {
    /// The file can't be read, is too large or is not text.
    Unreadable {
        /// The file.
        file_name: String,
        /// What is wrong, and the mend.
        problem: String,
    },
    /// The text is not a manifest.
    Invalid {
        /// The file.
        file_name: String,
        /// The faults in the order of the file; at most 50.
        problems: Vec<ManifestProblem>,
        /// How many more there are.
        more: usize,
    },
}

/// One fault of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestProblem {
    /// 1-based.
    pub line: usize,
    /// 1-based, in characters.
    pub column: usize,
    /// The variable or key concerned.
    pub subject: String,
    /// What is wrong, and the mend.
    pub problem: String,
    /// [`Reason::InvalidConfig`], or [`Reason::Unsupported`] for what this build can't do.
    pub reason: Reason,
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { file_name, problem } => write!(f, "{file_name}: {problem}"),
            Self::Invalid { file_name, problems, more } => {
                for (index, problem) in problems.iter().enumerate() {
                    let ManifestProblem { line, column, subject, problem, .. } = problem;
                    let separator = if index == 0 { "" } else { "\n" };
                    write!(f, "{separator}{file_name}:{line}:{column}: {subject}: {problem}")?;
                }
                match more {
                    0 => Ok(()),
                    more => write!(f, "\n{file_name}: {more} more problems"),
                }
            }
        }
    }
}

impl std::error::Error for ManifestError {}

impl Reasoned for ManifestError {
    /// [`Reason::Unsupported`] only where nothing else is wrong.
    fn reason(&self) -> Reason {
        match self {
            Self::Invalid { problems, .. } if problems.iter().all(|p| p.reason == Reason::Unsupported) => {
                Reason::Unsupported
            }
            Self::Invalid { .. } | Self::Unreadable { .. } => Reason::InvalidConfig,
        }
    }
}

/// Where lines start, to turn a byte offset into a line and a column.
struct Lines<'t> {
    text: &'t str,
    starts: Vec<usize>,
}

impl<'t> Lines<'t> {
    fn new(text: &'t str) -> Self {
        let starts = std::iter::once(0).chain(text.match_indices('\n').map(|(index, _)| index + 1)).collect();
        Self { text, starts }
    }

    /// 1-based: the first line starts at 0, so at least one start is not past the offset.
    fn line(&self, offset: usize) -> usize {
        self.starts.partition_point(|start| *start <= offset)
    }

    fn locate(&self, fault: Fault) -> ManifestProblem {
        let Fault { offset, subject, problem, reason } = fault;
        let line = self.line(offset);
        let start = self.starts.get(line.saturating_sub(1)).copied().unwrap_or_default();
        let column = self.text.get(start..offset).map_or(1, |before| before.chars().count() + 1);
        ManifestProblem { line, column, subject, problem, reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn environment(text: &str) -> EnvironmentName {
        EnvironmentName::parse(text).unwrap()
    }

    fn parsed(text: &str) -> Manifest {
        Manifest::parse(text, "claviger.toml").unwrap()
    }

    fn faults(text: &str) -> Vec<String> {
        let error = Manifest::parse(text, "claviger.toml").unwrap_err();
        error.to_string().lines().map(str::to_owned).collect()
    }

    /// The only fault of a manifest whose `[env]` stands on line 1.
    fn fault(line: &str) -> String {
        let mut all = faults(&format!("[env]\n{line}\n"));
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    fn shown(variable: &Variable) -> String {
        match &variable.source {
            VariableSource::Reference { reference, min_length, allow_empty } => {
                format!("{}={reference} {min_length:?} {allow_empty} line {}", variable.name, variable.line)
            }
            VariableSource::Literal(value) => {
                format!("{}={:?} line {}", variable.name, value.expose_text().unwrap(), variable.line)
            }
        }
    }

    #[test]
    fn each_kind_of_entry_is_read_in_the_order_of_the_file() {
        let manifest = parsed(
            "[env]\nB = \"database#host\"\nA = { ref = \"production:jwt#secret\", min_length = 1_0, as = \"env\" }\n\
             C = { value = \"\" }\nD = { ref = \"motd\", allow_empty = true }\n[env.E]\nref = \"e\"\n",
        );
        let shown: Vec<_> = manifest.variables_for(&environment("staging")).iter().map(shown).collect();
        assert_eq!(
            shown,
            [
                "B=database#host None false line 2",
                "A=production:jwt#secret Some(10) false line 3",
                "C=\"\" line 4",
                "D=motd None true line 5",
                "E=e None false line 6",
            ]
        );
    }

    #[test]
    fn an_overlay_replaces_by_name_and_adds() {
        let manifest = parsed(
            "[env]\nA = \"a\"\nB = \"b\"\n[environments.development]\nZ = { value = \"z\" }\nA = { value = \"dev\" }\n",
        );
        let names = |text| manifest.variables_for(&environment(text)).iter().map(shown).collect::<Vec<_>>();
        assert_eq!(names("production"), ["A=a None false line 2", "B=b None false line 3"]);
        assert_eq!(names("development"), ["A=\"dev\" line 6", "B=b None false line 3", "Z=\"z\" line 5"]);
    }

    #[test]
    fn every_fault_is_told_with_its_place() {
        let all = faults(
            "[env]\n1A = \"a\"\nB = 5\nC = { reff = \"c\" }\nD = { ref = \"d\", min_lenght = 3 }\nE = \"a#b#c\"\n\
             [enviroments.dev]\n[environments.Prod]\nF = { ref = \"f\", value = \"f\" }\n",
        );
        assert_eq!(
            all,
            [
                "claviger.toml:2:1: 1A: the name starts with a digit, which no shell accepts; put a letter or `_` first",
                "claviger.toml:3:5: B: is of type integer; write a reference in quotes, or { value = \"…\" }",
                "claviger.toml:4:7: C: unknown key `reff` (did you mean `ref`?); known are ref, value, min_length, \
                 allow_empty, as",
                "claviger.toml:5:18: D: unknown key `min_lenght` (did you mean `min_length`?); known are ref, value, \
                 min_length, allow_empty, as",
                "claviger.toml:6:5: E: it is empty, or has `:` or `#` twice; write \"[environment:]name[#field]\", or \
                 { value = \"…\" } for a literal",
                "claviger.toml:7:2: enviroments: is not a table of a manifest (did you mean `environments`?); variables \
                 belong under [env]",
                "claviger.toml:8:15: environments: environment `Prod`: character 1 (`P`) is not one of a-z, 0-9 and -",
                "claviger.toml:9:26: F: has both `ref` and `value`; keep one of them",
            ]
        );
    }

    #[test]
    fn conditions_are_bounded_and_belong_to_references() {
        for (line, expected) in [
            ("A = { ref = \"a\", min_length = 0 }", "`min_length` is not a whole number from 1 to 65536"),
            ("A = { ref = \"a\", min_length = 65537 }", "`min_length` is not a whole number from 1 to 65536"),
            ("A = { ref = \"a\", min_length = \"8\" }", "`min_length` is not a whole number from 1 to 65536"),
            ("A = { ref = \"a\", allow_empty = 1 }", "`allow_empty` is neither true nor false"),
            ("A = { ref = \"a\", allow_empty = true, min_length = 8 }", "contradict each other"),
            ("A = { ref = 5 }", "`ref` is of type integer; write it in quotes"),
            ("A = { value = 5 }", "`value` is of type integer; write it in quotes"),
            ("A = { value = \"a\", min_length = 8 }", "`min_length` goes with `ref` only"),
            ("A = { value = \"a\\u0000\" }", "holds a NUL character"),
            ("A = { ref = \"a\", as = \"envv\" }", "`as` is not \"env\""),
            ("A = {}", "has neither `ref` nor `value`"),
            ("A = [\"a\"]", "is of type array"),
            ("LD_PRELOAD = \"a\"", "reserved"),
            ("CLAVIGER_TOKEN = { value = \"a\" }", "reserved"),
        ] {
            let fault = fault(line);
            assert!(fault.starts_with("claviger.toml:2:") && fault.contains(expected), "{line}: {fault}");
        }
    }

    #[test]
    fn what_is_to_come_is_refused_as_unsupported() {
        for line in [
            "A = { template = \"{{ database#password }}\", format = \"uri\" }",
            "A = { ref = \"a\", as = \"file\" }",
            "A = { ref = \"a\", as = \"fd\" }",
        ] {
            let error = Manifest::parse(&format!("[env]\n{line}"), "m").unwrap_err();
            assert_eq!(error.reason(), Reason::Unsupported, "{error}");
            assert!(error.to_string().contains("2:") && error.to_string().contains(" A: "), "{error}");
            assert!(error.to_string().contains("not supported yet"), "{error}");
        }
        let mixed = Manifest::parse("[env]\nA = { template = \"\" }\nB = 5", "m").unwrap_err();
        assert_eq!(mixed.reason(), Reason::InvalidConfig);
    }

    #[test]
    fn syntax_and_duplicates_have_a_place() {
        assert_eq!(
            faults("[env]\nA = \"a\"\nA = \"b\"\n"),
            ["claviger.toml:3:1: A: stands twice; keep one of them"]
        );
        let all = faults("[env]\nA = hunter2\nB = \"b\n");
        assert!(all.first().unwrap().starts_with("claviger.toml:2:5: not valid TOML: "), "{all:?}");
        assert!(all.last().unwrap().starts_with("claviger.toml:3:"), "both lines are told: {all:?}");
        assert!(!all.concat().contains("hunter2"), "{all:?}");
    }

    #[test]
    fn a_manifest_declares_something() {
        for text in ["", "# nothing\n", "[env]\n", "[environments.development]\nA = \"a\"\n"] {
            let all = faults(text);
            assert!(all.len() == 1 && all[0].contains("declares no variable"), "{text:?}: {all:?}");
        }
        let all = faults("env = \"x\"");
        assert_eq!(all, ["claviger.toml:1:7: env: is of type string; write it as a table, [env]"]);
    }

    #[test]
    fn a_byte_order_mark_and_windows_line_ends_are_fine() {
        let manifest = parsed("\u{feff}[env]\r\nA = \"a\"\r\nB = \"b\"\r\n");
        let lines: Vec<_> =
            manifest.variables_for(&environment("staging")).iter().map(|variable| variable.line).collect();
        assert_eq!(lines, [2, 3]);
        assert_eq!(
            faults("\u{feff}env = 1")[0],
            "claviger.toml:1:7: env: is of type integer; write it as a table, [env]"
        );
    }

    #[test]
    fn sizes_are_bounded_and_faults_are_counted() {
        let text = format!("[env]\nA = \"a\"\n#{}", "x".repeat(MAX_MANIFEST_BYTES));
        assert!(Manifest::parse(&text, "m").unwrap_err().to_string().contains("larger than 1048576 bytes"));
        let many: String = (0..60).map(|n| format!("A{n} = 5\n")).collect();
        let all = faults(&format!("[env]\n{many}"));
        assert_eq!(all.len(), MAX_PROBLEMS + 1);
        assert_eq!(all[MAX_PROBLEMS], "claviger.toml: 10 more problems");
    }

    #[test]
    fn a_file_is_read_or_named_in_the_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("claviger.toml");
        let absent = Manifest::load(&path).unwrap_err();
        assert_eq!(absent.reason(), Reason::InvalidConfig);
        assert!(absent.to_string().contains("claviger.toml: can't be read"), "{absent}");
        std::fs::write(&path, "[env]\nA = \"a\"\n").unwrap();
        assert_eq!(Manifest::load(&path).unwrap().variables_for(&environment("staging")).len(), 1);
        std::fs::write(&path, b"[env]\nA = \"\xff\"\n").unwrap();
        assert!(Manifest::load(&path).unwrap_err().to_string().contains("is not UTF-8 at byte 12"));
        assert!(Manifest::load(folder.path()).unwrap_err().to_string().contains("can't be read"));
    }

    #[test]
    fn neither_errors_nor_debug_show_a_value() {
        const CANARY: &str = "canary-5f3a";
        let manifest = parsed(&format!("[env]\nA = {{ value = \"{CANARY}\" }}"));
        assert!(!format!("{manifest:?}").contains(CANARY));
        for line in [
            "A = { value = \"canary-5f3a\", bogus = 1 }",
            "A = { value = \"canary-5f3a\", ref = \"a\" }",
            "A = { value = \"canary-5f3a\\u0000\" }",
            "A = \"canary-5f3a is not a reference\"",
            "A = \"x:canary-5f3a:y\"",
            "A = canary-5f3a",
            "A = \"canary-5f3a",
            "A = { ref = \"a\", as = \"canary-5f3a\" }",
        ] {
            let error = Manifest::parse(&format!("[env]\n{line}\n"), "m").unwrap_err();
            assert!(!error.to_string().contains(CANARY), "{error}");
            assert!(!format!("{error:?}").contains(CANARY), "{error:?}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_faults_are_one_line_each(
            text in prop_oneof![
                "(?s).{0,200}",
                "(?s)\\[env\\]\n([A-Z_\\-]{1,3} = (\"[a-z:#]{0,4}\"|5|\\{ [a-z]{1,3} = \"(?s).{0,3}\" \\})\n){0,6}",
            ],
            file_name in "(?s).{0,10}",
        ) {
            if let Err(error) = Manifest::parse(&text, &file_name) {
                let message = error.to_string();
                let told = match &error {
                    ManifestError::Unreadable { .. } => 1,
                    ManifestError::Invalid { problems, more, .. } => problems.len() + usize::from(*more > 0),
                };
                prop_assert!(told > 0);
                prop_assert_eq!(message.split('\n').count(), told);
                prop_assert!(!message.chars().any(|c| c.is_control() && c != '\n'));
            }
        }

        #[test]
        fn an_overlay_never_loses_or_doubles_a_name(
            base in proptest::collection::btree_set("[A-D]", 1..4),
            overlay in proptest::collection::btree_set("[A-F]", 0..6),
        ) {
            let entries = |names: &std::collections::BTreeSet<String>| {
                names.iter().map(|name| format!("{name}_ = \"x\"\n")).collect::<String>()
            };
            let text = format!("[env]\n{}[environments.dev]\n{}", entries(&base), entries(&overlay));
            let variables = parsed(&text).variables_for(&environment("dev"));
            let names: Vec<_> = variables.iter().map(|v| v.name.as_str().trim_end_matches('_').to_owned()).collect();
            let distinct: std::collections::BTreeSet<_> = names.iter().cloned().collect();
            prop_assert_eq!(distinct.len(), names.len());
            let wanted: std::collections::BTreeSet<_> = base.union(&overlay).cloned().collect();
            prop_assert_eq!(distinct, wanted);
        }
    }
}
