//! Names of environment variables, and those that a secret may never set.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use super::{cut, quoted};
use crate::error::{Reason, Reasoned};

/// The longest name, in bytes: room for any secret's name, an underscore and any field's name.
const MAX_NAME: usize = 1_024;

/// Names refused, by what they would decide; a trailing `*` stands for any ending.
///
/// INVARIANT: a value from a store never decides which code runs. Without a manifest the store's own names become
/// variable names (`ld` with a field `preload` would be `LD_PRELOAD`), so whoever may write a secret could otherwise
/// run code wherever it is injected. Literals are refused alike, so that a manifest in a folder just checked out can't
/// do it either. What the caller's own environment holds passes through untouched: that is where to set these.
///
/// The loaders, shells and interpreters are covered; a program's own variables can't all be known.
const RESERVED: &[(&str, &[&str])] = &[
    ("is claviger's own and never reaches a child", &["CLAVIGER_*"]),
    (
        "tells the dynamic loader or a library what code to load",
        &[
            "LD_*",
            "DYLD_*",
            "GCONV_PATH",
            "GLIBC_TUNABLES",
            "LOCPATH",
            "NLSPATH",
            "OPENSSL_CONF",
            "OPENSSL_ENGINES",
            "OPENSSL_MODULES",
        ],
    ),
    (
        "decides which program a name means, or whose settings it reads",
        &["PATH", "HOME", "SHELL", "ZDOTDIR", "XDG_CONFIG_*"],
    ),
    (
        "tells a shell what to run or how to read its input",
        &[
            "BASH_ENV",
            "BASH_LOADABLES_PATH",
            "BASHOPTS",
            "CDPATH",
            "ENV",
            "FPATH",
            "GLOBIGNORE",
            "IFS",
            "PROMPT_COMMAND",
            "PS4",
            "SHELLOPTS",
        ],
    ),
    (
        "tells an interpreter what code to load",
        &[
            "CLASSPATH",
            "DOTNET_STARTUP_HOOKS",
            "ERL_AFLAGS",
            "ERL_FLAGS",
            "ERL_ZFLAGS",
            "JAVA_TOOL_OPTIONS",
            "JDK_JAVA_OPTIONS",
            "LUA_CPATH*",
            "LUA_INIT*",
            "LUA_PATH*",
            "NODE_OPTIONS",
            "NODE_PATH",
            "PERL5DB",
            "PERL5LIB",
            "PERL5OPT",
            "PERLLIB",
            "PHPRC",
            "PHP_INI_SCAN_DIR",
            "PYTHONBREAKPOINT",
            "PYTHONHOME",
            "PYTHONPATH",
            "PYTHONSTARTUP",
            "PYTHONWARNINGS",
            "RUBYLIB",
            "RUBYOPT",
            "_JAVA_OPTIONS",
        ],
    ),
    (
        "names a program that other programs start",
        &[
            "BROWSER",
            "EDITOR",
            "GIT_ASKPASS",
            "GIT_EDITOR",
            "GIT_EXEC_PATH",
            "GIT_EXTERNAL_DIFF",
            "GIT_PAGER",
            "GIT_PROXY_COMMAND",
            "GIT_SSH",
            "GIT_SSH_COMMAND",
            "LESSCLOSE",
            "LESSOPEN",
            "PAGER",
            "SSH_ASKPASS",
            "VISUAL",
        ],
    ),
];

/// The name of an environment variable that may be injected: `[A-Za-z_][A-Za-z0-9_]*` (POSIX.1-2017, Base
/// Definitions, section 8.1, with lower case), at most 1,024 bytes, and none of the reserved names.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VariableName(Arc<str>);

impl VariableName {
    /// Parses a variable's name.
    ///
    /// # Errors
    /// [`Reason::InvalidArgument`], saying what is refused and where.
    pub fn parse(text: &str) -> Result<Self, VariableNameError> {
        match problem_of(text) {
            None => Ok(Self(text.into())),
            Some(problem) => Err(VariableNameError { shown: quoted(text), problem }),
        }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VariableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for VariableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for VariableName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// Why a text is not the name of a variable that may be injected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("variable {shown}: {problem}")]
pub struct VariableNameError {
    shown: String,
    problem: String,
}

impl VariableNameError {
    /// What is wrong, without the name.
    #[must_use]
    pub fn problem(&self) -> &str {
        &self.problem
    }
}

impl Reasoned for VariableNameError {
    fn reason(&self) -> Reason {
        Reason::InvalidArgument
    }
}

fn problem_of(text: &str) -> Option<String> {
    let permitted = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if text.is_empty() {
        return Some("a variable's name is empty; name it, for example `DB_PASSWORD`".to_owned());
    }
    if text.len() > MAX_NAME {
        return Some(format!("the name is {} bytes long; at most {MAX_NAME} are permitted", text.len()));
    }
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return Some(
            "the name starts with a digit, which no shell accepts; put a letter or `_` first".to_owned(),
        );
    }
    if let Some((index, c)) = text.chars().enumerate().find(|(_, c)| !permitted(*c)) {
        let c = cut(c.encode_utf8(&mut [0; 4]));
        return Some(format!(
            "character {} (`{c}`) of the name is not one of A-Z, a-z, 0-9 and _",
            index + 1
        ));
    }
    reserved(text).map(|why| {
        format!("the name is reserved because it {why}; choose another, or set it outside claviger")
    })
}

fn reserved(name: &str) -> Option<&'static str> {
    let is_meant = |pattern: &&str| match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == *pattern,
    };
    RESERVED.iter().find(|(_, patterns)| patterns.iter().any(is_meant)).map(|(why, _)| *why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_follow_the_grammar() {
        for good in ["A", "_", "_a", "DB_PASSWORD", "db_password", "A1", "PATHS", "ENVIRONMENT", "HOME_URL"] {
            assert_eq!(VariableName::parse(good).unwrap().as_str(), good);
        }
        let long = "A".repeat(MAX_NAME + 1);
        for bad in ["", "1ABC", "a-b", "a.b", "A=B", "A B", "A\0", "A\n", "É", "a/b", &long] {
            assert_eq!(VariableName::parse(bad).unwrap_err().reason(), Reason::InvalidArgument, "{bad:?}");
        }
        let error = VariableName::parse("a-b\n").unwrap_err().to_string();
        assert_eq!(
            error,
            r"variable `a-b\n`: character 2 (`-`) of the name is not one of A-Z, a-z, 0-9 and _"
        );
    }

    #[test]
    fn names_that_decide_which_code_runs_are_refused() {
        for bad in [
            "LD_PRELOAD",
            "LD_LIBRARY_PATH",
            "LD_AUDIT",
            "DYLD_INSERT_LIBRARIES",
            "GLIBC_TUNABLES",
            "BASH_ENV",
            "ENV",
            "IFS",
            "PATH",
            "HOME",
            "NODE_OPTIONS",
            "PYTHONPATH",
            "PERL5OPT",
            "RUBYOPT",
            "_JAVA_OPTIONS",
            "LUA_INIT_5_4",
            "GIT_SSH_COMMAND",
            "CLAVIGER_TOKEN",
            "CLAVIGER_ANYTHING",
        ] {
            let error = VariableName::parse(bad).unwrap_err().to_string();
            assert!(error.contains("reserved") && error.contains("outside claviger"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_messages_are_one_short_line(text in ".{0,1100}") {
            if let Err(error) = VariableName::parse(&text) {
                let message = error.to_string();
                prop_assert!(!message.chars().any(char::is_control));
                prop_assert!(message.chars().count() < 1_000);
            }
        }

        #[test]
        fn what_parses_is_a_name_for_every_shell(text in "[A-Za-z0-9_.=-]{0,12}") {
            if let Ok(name) = VariableName::parse(&text) {
                prop_assert_eq!(name.as_str(), text.as_str());
                prop_assert!(!text.starts_with(|c: char| c.is_ascii_digit()));
                prop_assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'));
            }
        }
    }
}
