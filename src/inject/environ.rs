//! The child's environment: what the parent hands down and what is injected, within what the kernel takes.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;

use super::{InjectError, Notice, Variables, quoted};
use crate::secret::SecretValue;

/// Every other variable of the broker's own stays behind: the child is never handed a credential of its parent.
const PASSED_ON: [&str; 2] = ["CLAVIGER_ADDR", "CLAVIGER_ENV"];
/// What a pristine environment keeps, besides `LC_*`: what a program needs to find others, its user and its language.
const PRISTINE: [&str; 9] = ["HOME", "LANG", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "TZ", "USER"];

/// How the child's environment is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Hand down only `PATH`, `HOME`, `USER`, `LOGNAME`, `SHELL`, `TERM`, `LANG`, `LC_*`, `TZ` and `TMPDIR`.
    pub pristine: bool,
    /// Which value counts where the parent has the variable too.
    pub existing: Existing,
}

/// Which value counts where the parent has the variable too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Existing {
    /// The injected one.
    #[default]
    SecretWins,
    /// The parent's.
    ParentWins,
}

/// The environment that a child will have. Injected values are shared with the [`Variables`] they came from, and wiped
/// with them; what is inherited is as public as this process's own environment.
pub struct ChildEnvironment {
    entries: BTreeMap<OsString, Entry>,
}

enum Entry {
    Inherited(OsString),
    Injected(SecretValue),
}

/// Puts variables into a copy of `parent`, an environment as `std::env::vars_os` gives it (of two entries of one name
/// the later counts). Of the parent's `CLAVIGER_*` only `CLAVIGER_ENV` and `CLAVIGER_ADDR` are handed down, and in a
/// pristine environment none.
///
/// # Errors
/// [`InjectError::StringTooLong`] and [`InjectError::TooLarge`], as far as the environment alone can tell.
pub fn compose(
    parent: impl IntoIterator<Item = (OsString, OsString)>,
    variables: &Variables,
    options: Options,
) -> Result<(ChildEnvironment, Vec<Notice>), InjectError> {
    let mut entries: BTreeMap<OsString, Entry> = parent
        .into_iter()
        .filter(|(name, _)| is_handed_down(name, options.pristine))
        .map(|(name, value)| (name, Entry::Inherited(value)))
        .collect();
    let mut notices = Vec::new();
    for (name, value) in variables.iter() {
        let key = OsStr::new(name.as_str());
        let differs = entries.get(key).is_some_and(|found| found.expose().as_bytes() != value.expose());
        match (differs, options.existing) {
            (true, Existing::ParentWins) => {
                notices.push(Notice::Kept { variable: name.clone() });
                continue;
            }
            (true, Existing::SecretWins) => notices.push(Notice::Overridden { variable: name.clone() }),
            (false, _) => {}
        }
        entries.insert(key.to_owned(), Entry::Injected(value.clone()));
    }
    let environment = ChildEnvironment { entries };
    environment.fits(&[], Limits::of_this_process())?;
    Ok((environment, notices))
}

fn is_handed_down(name: &OsStr, pristine: bool) -> bool {
    let is_one_of = |names: &[&str]| names.iter().any(|one| name == *one);
    let bytes = name.as_bytes();
    if bytes.starts_with(b"CLAVIGER_") {
        return !pristine && is_one_of(&PASSED_ON);
    }
    !pristine || bytes.starts_with(b"LC_") || is_one_of(&PRISTINE)
}

impl Entry {
    fn expose(&self) -> &OsStr {
        match self {
            Self::Inherited(value) => value,
            Self::Injected(value) => OsStr::from_bytes(value.expose()),
        }
    }
}

impl ChildEnvironment {
    /// The names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &OsStr> {
        self.entries.keys().map(OsString::as_os_str)
    }

    /// The names with their values, sorted. Whoever calls this answers for where the values go.
    pub fn expose(&self) -> impl Iterator<Item = (&OsStr, &OsStr)> {
        self.entries.iter().map(|(name, entry)| (name.as_os_str(), entry.expose()))
    }

    /// The search path that the child will have.
    pub(super) fn path(&self) -> Option<&OsStr> {
        self.entries.get(OsStr::new("PATH")).map(Entry::expose)
    }

    /// Whether the kernel takes this environment together with a command's arguments. Asked beforehand, because the
    /// kernel's own answer (`E2BIG`) doesn't say which string is at fault.
    pub(super) fn fits(&self, command: &[OsString], limits: Limits) -> Result<(), InjectError> {
        let mut sizes: Vec<_> =
            self.entries.iter().map(|(name, entry)| (name.len() + entry.expose().len() + 2, name)).collect();
        sizes.sort_by(|a, b| b.cmp(a));
        if let Some((size, name)) = sizes.first().filter(|(size, _)| *size > limits.string) {
            return Err(limits.exceeded(format!("variable {}", shown(name)), *size));
        }
        let arguments = command.iter().map(|argument| argument.len() + 1);
        if let Some((index, size)) = arguments.clone().enumerate().find(|(_, size)| *size > limits.string) {
            return Err(limits.exceeded(format!("argument {index} of the command"), size));
        }
        let strings: usize = sizes.iter().map(|(size, _)| size).sum::<usize>() + arguments.sum::<usize>();
        let size = strings + (sizes.len() + command.len()) * size_of::<usize>();
        if size > limits.total {
            let largest: Vec<_> =
                sizes.iter().take(3).map(|(size, name)| format!("{} ({size} bytes)", shown(name))).collect();
            return Err(InjectError::TooLarge { size, limit: limits.total, largest: largest.join(", ") });
        }
        Ok(())
    }
}

impl fmt::Debug for ChildEnvironment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.entries.keys()).finish()
    }
}

fn shown(name: &OsStr) -> String {
    quoted(&name.to_string_lossy())
}

/// How much the kernel passes to a new program (execve(2), "Limits on size of arguments and environment").
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// For one string with its closing NUL: `MAX_ARG_STRLEN`, 32 pages.
    string: usize,
    /// For all strings and the pointers to them, less the margin.
    total: usize,
}

impl Limits {
    /// Three quarters of `_STK_LIM`, whatever the stack's limit.
    const MOST: usize = 6 << 20;
    /// `ARG_MAX`, whatever the stack's limit.
    const LEAST: usize = 128 << 10;
    /// The kernel also counts the program's path, and for a script its interpreter's and its first line.
    const MARGIN: usize = 8 << 10;

    pub(super) fn of_this_process() -> Self {
        let stack = rustix::process::getrlimit(rustix::process::Resource::Stack).current;
        Self::new(stack, rustix::param::page_size())
    }

    /// From the stack's limit in bytes (`None`: unlimited), of which a quarter counts, and the page size.
    fn new(stack: Option<u64>, page: usize) -> Self {
        let quarter = stack.and_then(|stack| usize::try_from(stack / 4).ok()).unwrap_or(Self::MOST);
        Self { string: 32 * page, total: quarter.clamp(Self::LEAST, Self::MOST) - Self::MARGIN }
    }

    fn exceeded(self, what: String, size: usize) -> InjectError {
        InjectError::StringTooLong { what, size, limit: self.string }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Manifest, resolve};
    use super::*;
    use crate::error::{Reason, Reasoned as _};
    use crate::secret::{EnvironmentName, SecretId};
    use proptest::prelude::*;

    const CANARY: &str = "canary-5f3a";

    fn parent(entries: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
        entries.iter().map(|(name, value)| (name.into(), value.into())).collect()
    }

    /// Each name with one value.
    fn variables(names: &[&str], value: &str) -> Variables {
        let entries: String =
            names.iter().map(|name| format!("{name} = {{ ref = \"a\", allow_empty = true }}\n")).collect();
        let environment = EnvironmentName::parse("staging").unwrap();
        let declared = match Manifest::parse(&format!("[env]\n{entries}"), "m") {
            Ok(manifest) => manifest.variables_for(&environment),
            Err(_) if names.is_empty() => Vec::new(),
            Err(error) => panic!("{error}"),
        };
        let answers = |_: &SecretId| Ok(SecretValue::text(value.to_owned()).unwrap());
        resolve(&declared, &environment, &answers).unwrap()
    }

    fn pairs(environment: &ChildEnvironment) -> Vec<(&str, &str)> {
        environment.expose().map(|(name, value)| (name.to_str().unwrap(), value.to_str().unwrap())).collect()
    }

    fn composed(
        entries: &[(&str, &str)],
        variables: &Variables,
        options: Options,
    ) -> (ChildEnvironment, Vec<Notice>) {
        compose(parent(entries), variables, options).unwrap()
    }

    #[test]
    fn the_brokers_own_credentials_stay_behind() {
        let entries = [
            ("CLAVIGER_TOKEN", CANARY),
            ("CLAVIGER_TOKEN_FILE", "/t"),
            ("CLAVIGER_ROOT_KEY", CANARY),
            ("CLAVIGER_", "x"),
            ("CLAVIGER_ENV", "staging"),
            ("CLAVIGER_ADDR", "unix:///s"),
            ("CLAVIGERX", "mine"),
            ("PATH", "/bin"),
        ];
        let (environment, notices) = composed(&entries, &variables(&["A"], "a"), Options::default());
        assert_eq!(
            pairs(&environment),
            [
                ("A", "a"),
                ("CLAVIGERX", "mine"),
                ("CLAVIGER_ADDR", "unix:///s"),
                ("CLAVIGER_ENV", "staging"),
                ("PATH", "/bin"),
            ]
        );
        assert!(notices.is_empty());
    }

    #[test]
    fn a_pristine_environment_keeps_the_listed_names_only() {
        let entries = [
            ("PATH", "/bin"),
            ("HOME", "/root"),
            ("LC_ALL", "C"),
            ("AWS_SECRET_ACCESS_KEY", CANARY),
            ("CLAVIGER_ENV", "staging"),
            ("LD_PRELOAD", "/x.so"),
            ("TZ", "UTC"),
        ];
        let options = Options { pristine: true, ..Options::default() };
        let (environment, _) = composed(&entries, &variables(&["A"], "a"), options);
        assert_eq!(
            pairs(&environment),
            [("A", "a"), ("HOME", "/root"), ("LC_ALL", "C"), ("PATH", "/bin"), ("TZ", "UTC")]
        );
    }

    #[test]
    fn precedence_is_as_asked_and_said() {
        let entries = [("A", "parent"), ("B", "new"), ("C", "parent")];
        let injected = variables(&["A", "B"], "new");
        let (environment, notices) = composed(&entries, &injected, Options::default());
        assert_eq!(pairs(&environment), [("A", "new"), ("B", "new"), ("C", "parent")]);
        assert_eq!(
            notices.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["A is set in the calling environment to another value; the secret replaces it"]
        );
        let options = Options { existing: Existing::ParentWins, ..Options::default() };
        let (environment, notices) = composed(&entries, &injected, options);
        assert_eq!(pairs(&environment), [("A", "parent"), ("B", "new"), ("C", "parent")]);
        assert!(matches!(notices.as_slice(), [Notice::Kept { variable }] if variable.as_str() == "A"));
    }

    #[test]
    fn what_is_not_unicode_is_handed_down_untouched() {
        let odd = (OsString::from("ODD"), OsStr::from_bytes(b"\xff\xfe").to_owned());
        let function = (OsString::from("BASH_FUNC_f%%"), OsString::from("() { :; }"));
        let (environment, _) = compose([odd, function], &variables(&[], ""), Options::default()).unwrap();
        let found: Vec<_> = environment.expose().map(|(_, value)| value.as_bytes()).collect();
        assert_eq!(found, [&b"() { :; }"[..], b"\xff\xfe"]);
    }

    #[test]
    fn limits_follow_the_stack_between_their_bounds() {
        let total = |stack| Limits::new(stack, 4_096).total + Limits::MARGIN;
        assert_eq!(total(Some(8 << 20)), 2 << 20);
        assert_eq!(total(Some(64 << 20)), 6 << 20);
        assert_eq!(total(Some(u64::MAX)), 6 << 20);
        assert_eq!(total(None), 6 << 20);
        assert_eq!(total(Some(0)), 128 << 10);
        assert_eq!(Limits::new(None, 4_096).string, 131_072);
        assert_eq!(Limits::new(None, 65_536).string, 2 << 20);
    }

    #[test]
    fn one_string_too_long_is_named() {
        let limits = Limits { string: 100, total: 1_000 };
        let fits = |length: usize, command: &[&str]| {
            let big = "x".repeat(length);
            let (environment, _) =
                composed(&[("BIG", big.as_str())], &variables(&[], ""), Options::default());
            let command: Vec<OsString> = command.iter().map(OsString::from).collect();
            environment.fits(&command, limits)
        };
        assert_eq!(fits(95, &["c"]), Ok(()), "BIG=, 95 bytes and NUL are 100");
        let error = fits(96, &["c"]).unwrap_err();
        assert_eq!(error.reason(), Reason::LimitExceeded);
        assert!(error.to_string().starts_with("variable `BIG` is 101 bytes long"), "{error}");
        assert_eq!(fits(1, &["c", &"y".repeat(99)]), Ok(()));
        let error = fits(1, &["c", &"y".repeat(100)]).unwrap_err().to_string();
        assert!(
            error.starts_with("argument 1 of the command is 101 bytes long") && !error.contains("yy"),
            "{error}"
        );
    }

    #[test]
    fn too_much_in_all_names_the_largest() {
        let value = CANARY.repeat(10);
        let (environment, _) = composed(
            &[("P", "small"), ("Q", "larger")],
            &variables(&["S1", "S2"], &value),
            Options::default(),
        );
        // Four strings: 2 × (2 + 110 + 2), 1 + 5 + 2, 1 + 6 + 2; one argument of 4; five pointers.
        let size = 2 * 114 + 8 + 9 + 4 + 5 * size_of::<usize>();
        let command = [OsString::from("run")];
        assert_eq!(environment.fits(&command, Limits { string: 1_000, total: size }), Ok(()));
        let error = environment.fits(&command, Limits { string: 1_000, total: size - 1 }).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("`S2` (114 bytes), `S1` (114 bytes), `Q` (9 bytes)"), "{message}");
        assert!(!message.contains(CANARY), "{message}");
    }

    #[test]
    fn this_process_has_room_for_its_own_environment() {
        assert!(compose(std::env::vars_os(), &variables(&["A"], "a"), Options::default()).is_ok());
    }

    #[test]
    fn debug_shows_names_only() {
        let (environment, _) = composed(&[("P", CANARY)], &variables(&["S"], CANARY), Options::default());
        assert_eq!(format!("{environment:?}"), r#"{"P", "S"}"#);
    }

    proptest! {
        #[test]
        fn composing_keeps_its_rules(
            inherited in proptest::collection::btree_map("(CLAVIGER_|LC_)?[A-Z]{1,4}|PATH|HOME", "(?s).{0,8}", 0..8),
            names in proptest::collection::btree_set("V_[A-Z]{1,3}", 0..4),
            value in "[^\0]{0,8}",
            pristine: bool,
            parent_wins: bool,
        ) {
            let names: Vec<_> = names.iter().map(String::as_str).collect();
            let existing = if parent_wins { Existing::ParentWins } else { Existing::SecretWins };
            let entries: Vec<_> = inherited
                .iter()
                .map(|(name, value)| (name.as_str(), value.as_str()))
                .chain(names.first().map(|name| (*name, "the parent's")))
                .collect();
            let injected = variables(&names, &value);
            let (environment, notices) = composed(&entries, &injected, Options { pristine, existing });
            let found: BTreeMap<_, _> = environment.expose().collect();
            for name in environment.names() {
                let name = name.to_str().unwrap();
                prop_assert!(!name.starts_with("CLAVIGER_") || (!pristine && PASSED_ON.contains(&name)));
                let allowed = names.contains(&name) || name.starts_with("LC_") || PRISTINE.contains(&name);
                prop_assert!(!pristine || allowed, "{} in a pristine environment", name);
            }
            let kept = notices.iter().filter(|notice| matches!(notice, Notice::Kept { .. })).count();
            let exact = names.iter().filter(|name| found[OsStr::new(name)] == OsStr::new(&value)).count();
            prop_assert_eq!(exact + kept, names.len());
            prop_assert!(parent_wins || kept == 0);
        }
    }
}
