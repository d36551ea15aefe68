//! How deep and how long a policy may be. The parser, the validator and the evaluator go down a policy's text by
//! recursion, so a text without bounds would end the process instead of being refused.

use super::PolicyError;
use super::source::SourceFile;

/// How many brackets may be open at a time.
const MOST_OPEN: usize = 64;
/// How long one statement may be, in characters that are neither white space nor comment. Operators in a row nest as well (`a && b && c` is two deep), so this bounds
/// what brackets don't.
const LONGEST_STATEMENT: usize = 16 * 1024;
/// The stack on which policies are read: enough for the longest statement of nothing but operators, in a debug build.
const STACK: usize = 256 * 1024 * 1024;

/// Refuses a text that would take the reader too deep.
pub(super) fn check(file: &SourceFile) -> Result<(), PolicyError> {
    let (mut open, mut length) = (0_usize, 0_usize);
    let mut rest = file.text.char_indices().peekable();
    while let Some((at, c)) = rest.next() {
        match c {
            '"' => skip_text(&mut rest),
            '/' if rest.peek().is_some_and(|(_, next)| *next == '/') => {
                while rest.next_if(|(_, c)| *c != '\n').is_some() {}
                continue;
            }
            '(' | '[' | '{' => open += 1,
            ')' | ']' | '}' => open = open.saturating_sub(1),
            _ => {}
        }
        length = match c {
            ';' => 0,
            c if c.is_whitespace() => length,
            _ => length + 1,
        };
        if open > MOST_OPEN {
            return Err(file.invalid(at, "is nested more than 64 deep; split the policy"));
        }
        if length > LONGEST_STATEMENT {
            return Err(file.invalid(at, "is in a statement of more than 16 KiB; split the policy"));
        }
    }
    Ok(())
}

/// Goes to the end of a string literal.
fn skip_text(rest: &mut std::iter::Peekable<std::str::CharIndices<'_>>) {
    while let Some((_, c)) = rest.next() {
        match c {
            '\\' => drop(rest.next()),
            '"' => return,
            _ => {}
        }
    }
}

/// Does `work` where there is room for it.
///
/// # Errors
/// Those of `work`; and where no thread can be had.
pub(super) fn with_room<T: Send>(
    work: impl FnOnce() -> Result<T, PolicyError> + Send,
) -> Result<T, PolicyError> {
    let failed =
        |problem: &str| PolicyError::Unreadable { path: "policies".to_owned(), problem: problem.to_owned() };
    std::thread::scope(|scope| {
        let reader = std::thread::Builder::new().name("policies".to_owned()).stack_size(STACK);
        match reader.spawn_scoped(scope, work) {
            Ok(reader) => {
                reader.join().unwrap_or_else(|_| Err(failed("reading them failed; this is a defect")))
            }
            Err(error) => {
                Err(failed(&format!("no thread can be had to read them: {error}; free some memory")))
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;
    use crate::environment::{Environment, Registry};
    use crate::error::{Reason, Reasoned as _};
    use crate::policy::{Policies, PolicySource, SHIPPED};

    fn load(condition: &str) -> Result<Policies, PolicyError> {
        let (schema, _) = SHIPPED
            .iter()
            .map(|(name, text)| (*text, *name))
            .find(|(_, name)| name.ends_with("schema"))
            .unwrap();
        let policy = format!(
            "@id(\"x\") permit (principal in Group::\"g\", action == Action::\"read\", resource) when {{ {condition} }};"
        );
        let texts =
            vec![("schema.cedarschema".to_owned(), schema.to_owned()), ("x.cedar".to_owned(), policy)];
        let registry = Registry::new([Environment::sealed("development".parse().unwrap())]).unwrap();
        Policies::load(PolicySource::Texts(texts), registry, SystemClock::shared())
    }

    #[test]
    fn what_is_too_deep_or_too_long_is_refused_and_ends_nothing() {
        for condition in [
            format!("{}true{}", "(".repeat(20_000), ")".repeat(20_000)),
            format!("{}true", "(".repeat(65)),
            "true && ".repeat(100_000) + "true",
            "if true then true else ".repeat(40_000) + "true",
            "[".repeat(1_000),
        ] {
            assert_eq!(load(&condition).err().unwrap().reason(), Reason::InvalidPolicy);
        }
    }

    #[test]
    fn what_is_within_the_bounds_is_read() {
        load(&format!("{}true{}", "(".repeat(50), ")".repeat(50))).unwrap();
        load(&("true && ".repeat(1_500) + "true")).unwrap();
        load(r#""((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((\"" != "//;""#)
            .unwrap();
        let _ = load(&("if true then true else ".repeat(600) + "true"));
    }
}
