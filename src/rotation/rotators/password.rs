//! Passwords by rules: how long, of which characters, which kinds of them at least, and what stands first.
//!
//! Every password that the rules permit is as likely as any other. A character is drawn by rejection: a random byte that
//! would make some characters likelier than others is thrown away. So is a whole password in which a required class is
//! missing: putting one character of each class somewhere and shuffling would favour passwords that have just one of a
//! class, throwing away favours none.

use std::ops::RangeInclusive;

use ring::rand::{SecureRandom as _, SystemRandom};
use serde_json::{Map, Value};
use zeroize::Zeroizing;

use super::object;
use crate::rotation::{Failure, Trouble};

/// The keys that [`Rules::from_settings`] knows.
pub(super) const KEYS: &[&str] = &["length", "alphabet", "classes", "require", "first"];

const LENGTHS: RangeInclusive<usize> = 8..=4_096;
const DEFAULT_LENGTH: usize = 40;
/// The longest password that is tried where a target refused another.
const STRICTER_LENGTH: usize = 32;
/// What an attacker can't go through, however fast the target answers. What `require` takes away, at most six bits where
/// there are no more than these, is not counted.
const MIN_BITS: f64 = 64.0;
/// Of rules with so many bits, at least one password in 40 has every required class: that none of these has is less likely
/// than a defect.
const TRIES: usize = 4_096;

/// A kind of character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Lower,
    Upper,
    Digit,
    Symbol,
}

impl Class {
    const ALL: [Self; 4] = [Self::Lower, Self::Upper, Self::Digit, Self::Symbol];

    const fn name(self) -> &'static str {
        match self {
            Self::Lower => "lower",
            Self::Upper => "upper",
            Self::Digit => "digit",
            Self::Symbol => "symbol",
        }
    }

    /// What it brings into an alphabet. The symbols are those that stand in a URL as they are (RFC 3986, section 2.3).
    const fn characters(self) -> &'static str {
        match self {
            Self::Lower => "abcdefghijklmnopqrstuvwxyz",
            Self::Upper => "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
            Self::Digit => "0123456789",
            Self::Symbol => "-._~",
        }
    }

    /// Whether a character is of this kind. Of symbols, an alphabet may have others than ours.
    const fn has(self, character: char) -> bool {
        match self {
            Self::Lower => character.is_ascii_lowercase(),
            Self::Upper => character.is_ascii_uppercase(),
            Self::Digit => character.is_ascii_digit(),
            Self::Symbol => character.is_ascii_punctuation(),
        }
    }

    fn is_in(self, text: &str) -> bool {
        text.chars().any(|character| self.has(character))
    }
}

/// What a password is like. The default: 40 of `A-Za-z0-9`, a letter first, which no shell, URL or connection string
/// takes for something else.
///
/// INVARIANT: the alphabet has at least two characters, each once, all printable ASCII without the space; each required
/// class is in it, and a letter where one stands first; there are at least 64 bits to guess.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    length: usize,
    alphabet: String,
    require: Vec<Class>,
    letter_first: bool,
}

impl Default for Rules {
    fn default() -> Self {
        let alphabet = [Class::Lower, Class::Upper, Class::Digit].map(Class::characters).concat();
        Self { length: DEFAULT_LENGTH, alphabet, require: Vec::new(), letter_first: true }
    }
}

impl Rules {
    /// Rules from a table of a definition:
    ///
    /// | key | |
    /// |---|---|
    /// | `length` | 8 to 4096; default 40 |
    /// | `alphabet` | the permitted characters: printable ASCII without the space, each once |
    /// | `classes` | instead of it: some of `lower`, `upper`, `digit`, `symbol` (`-._~`); default the first three |
    /// | `require` | classes of which each password has at least one character |
    /// | `first` | `letter` (default) or `any` |
    ///
    /// # Errors
    /// A line that names the key and the mend; also where there would be fewer than 64 bits to guess.
    pub fn from_settings(settings: &Map<String, Value>) -> Result<Self, String> {
        object::only(settings, KEYS)?;
        let rules = Self {
            length: length(settings)?,
            alphabet: alphabet(settings)?,
            require: classes(settings, "require")?.unwrap_or_default(),
            letter_first: letter_first(settings)?,
        };
        rules.check()?;
        Ok(rules)
    }

    /// What to try where a target refused a password: letters and digits alone, at most 32 of them. Symbols stay where
    /// one is required, and a longer password where it would be too easy to guess otherwise.
    #[must_use]
    pub fn stricter(&self) -> Self {
        let symbols = self.require.contains(&Class::Symbol);
        let kept = |character: &char| symbols || character.is_ascii_alphanumeric();
        let alphabet: String = self.alphabet.chars().filter(kept).collect();
        if alphabet.len() < 2 {
            return Self { length: STRICTER_LENGTH, require: self.require.clone(), ..Self::default() };
        }
        let letter_first = alphabet.contains(|character: char| character.is_ascii_alphabetic());
        let mut stricter = Self { alphabet, letter_first, ..self.clone() };
        stricter.length = self.length.min(STRICTER_LENGTH).max(stricter.shortest());
        stricter
    }

    /// A new password, in a buffer that is wiped.
    ///
    /// # Errors
    /// [`Trouble::Defect`] where the operating system gives no random bytes.
    pub fn generate(&self) -> Result<Zeroizing<String>, Failure> {
        for _ in 0..TRIES {
            let password = self.draw()?;
            if self.require.iter().all(|class| class.is_in(&password)) {
                return Ok(password);
            }
        }
        Err(Failure::new(Trouble::Defect, "no password has every class that `require` names"))
    }

    fn draw(&self) -> Result<Zeroizing<String>, Failure> {
        // Of its full size from the start: growing would leave copies behind.
        let mut password = Zeroizing::new(String::with_capacity(self.length));
        if self.letter_first {
            fill(&mut password, 1, &self.letters())?;
        }
        fill(&mut password, self.length, &self.alphabet)?;
        Ok(password)
    }

    fn letters(&self) -> String {
        self.alphabet.chars().filter(char::is_ascii_alphabetic).collect()
    }

    fn check(&self) -> Result<(), String> {
        if let Some(class) = self.require.iter().find(|class| !class.is_in(&self.alphabet)) {
            let class = class.name();
            return Err(format!(
                "`require` names `{class}`, but the alphabet has none; add some, or take it out"
            ));
        }
        if self.letter_first && self.letters().is_empty() {
            return Err(
                "the alphabet has no letter to stand first; add some, or set `first = \"any\"`".to_owned()
            );
        }
        let shortest = self.shortest();
        if self.length < shortest {
            let (length, of) = (self.length, self.alphabet.len());
            return Err(format!(
                "`length`: {length} of {of} characters can be guessed (fewer than {MIN_BITS} bits); make it {shortest} or \
                 more"
            ));
        }
        Ok(())
    }

    /// The length from which on there are enough bits to guess.
    fn shortest(&self) -> usize {
        let bits = |characters: usize| (characters as f64).log2();
        let first = if self.letter_first { self.letters().len() } else { self.alphabet.len() };
        let rest = ((MIN_BITS - bits(first)) / bits(self.alphabet.len())).ceil();
        (rest as usize).saturating_add(1)
    }
}

/// Random characters until a text has `length` of them, each of `alphabet` as likely as any other.
fn fill(text: &mut String, length: usize, alphabet: &str) -> Result<(), Failure> {
    let alphabet = alphabet.as_bytes();
    let size = alphabet.len().max(1);
    // From here on up to 255, the first characters of the alphabet would have one byte more than the others.
    let fair = 256 - 256 % size;
    let mut bytes = Zeroizing::new([0_u8; 64]);
    while text.len() < length {
        random(bytes.as_mut_slice())?;
        let drawn = bytes.iter().map(|byte| usize::from(*byte)).filter(|byte| *byte < fair);
        let characters = drawn.filter_map(|byte| alphabet.get(byte % size));
        let missing = length - text.len();
        text.extend(characters.take(missing).map(|byte| char::from(*byte)));
    }
    Ok(())
}

/// Random bytes from the operating system.
///
/// # Errors
/// [`Trouble::Defect`].
pub(super) fn random(bytes: &mut [u8]) -> Result<(), Failure> {
    SystemRandom::new()
        .fill(bytes)
        .map_err(|_| Failure::new(Trouble::Defect, "the operating system gives no random bytes"))
}

fn length(settings: &Map<String, Value>) -> Result<usize, String> {
    let Some(value) = settings.get("length") else { return Ok(DEFAULT_LENGTH) };
    let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
    let (least, most) = LENGTHS.into_inner();
    number
        .filter(|number| LENGTHS.contains(number))
        .ok_or_else(|| format!("`length` is a whole number from {least} to {most}"))
}

fn alphabet(settings: &Map<String, Value>) -> Result<String, String> {
    match (object::text(settings, "alphabet")?, classes(settings, "classes")?) {
        (Some(_), Some(_)) => Err("`alphabet` and `classes` say the same; keep one of them".to_owned()),
        (Some(text), None) => distinct(text),
        (None, Some(classes)) if classes.is_empty() => {
            Err("`classes` names none; leave it out, or name some".to_owned())
        }
        (None, Some(classes)) => Ok(classes.into_iter().map(Class::characters).collect()),
        (None, None) => Ok(Rules::default().alphabet),
    }
}

fn distinct(alphabet: &str) -> Result<String, String> {
    let mut seen = String::with_capacity(alphabet.len());
    for (index, character) in alphabet.chars().enumerate() {
        let position = index + 1;
        if !character.is_ascii_graphic() {
            return Err(format!(
                "`alphabet`: character {position} is a space, or not printable ASCII; leave it out"
            ));
        }
        if seen.contains(character) {
            return Err(format!(
                "`alphabet`: character {position} (`{character}`) stands there twice; leave it out"
            ));
        }
        seen.push(character);
    }
    if seen.len() < 2 {
        return Err("`alphabet` has fewer than two characters; name more, or leave it out".to_owned());
    }
    Ok(seen)
}

fn classes(settings: &Map<String, Value>, key: &str) -> Result<Option<Vec<Class>>, String> {
    let Some(names) = object::texts(settings, key)? else { return Ok(None) };
    let class = |name: &str| {
        let found = Class::ALL.into_iter().find(|class| class.name() == name);
        found.ok_or_else(|| {
            let known = Class::ALL.map(Class::name).join("`, `");
            format!("`{key}`: {} is not a class; there are `{known}`", object::shown(name))
        })
    };
    names.into_iter().map(class).collect::<Result<_, _>>().map(Some)
}

fn letter_first(settings: &Map<String, Value>) -> Result<bool, String> {
    match object::text(settings, "first")? {
        None | Some("letter") => Ok(true),
        Some("any") => Ok(false),
        Some(other) => Err(format!("`first` is \"letter\" or \"any\", not {}", object::shown(other))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::collections::BTreeMap;

    fn rules(settings: Value) -> Result<Rules, String> {
        Rules::from_settings(settings.as_object().unwrap())
    }

    /// Pearson's statistic for counts that should be equal.
    fn chi_square(counts: impl IntoIterator<Item = u64>) -> f64 {
        let counts: Vec<f64> = counts.into_iter().map(|count| count as f64).collect();
        let expected = counts.iter().sum::<f64>() / counts.len() as f64;
        counts.iter().map(|count| (count - expected).powi(2) / expected).sum()
    }

    /// What a fair source stays below, seven deviations out: once in a million million runs it does not (Wilson and
    /// Hilferty's approximation).
    fn bound(cells: usize) -> f64 {
        let freedom = cells as f64 - 1.0;
        let part = 2.0 / (9.0 * freedom);
        freedom * (1.0 - part + 7.0 * part.sqrt()).powi(3)
    }

    fn counted(characters: impl IntoIterator<Item = char>, alphabet: &str) -> Vec<u64> {
        let mut counts: BTreeMap<char, u64> = alphabet.chars().map(|character| (character, 0)).collect();
        for character in characters {
            *counts.get_mut(&character).expect("a character of the alphabet") += 1;
        }
        counts.into_values().collect()
    }

    #[test]
    fn the_default_is_safe_everywhere() {
        let rules = rules(json!({})).unwrap();
        assert_eq!(rules, Rules::default());
        for _ in 0..200 {
            let password = rules.generate().unwrap();
            assert_eq!(password.len(), 40);
            assert!(password.starts_with(|first: char| first.is_ascii_alphabetic()));
            assert!(password.chars().all(|character| character.is_ascii_alphanumeric()));
        }
        assert_ne!(*rules.generate().unwrap(), *rules.generate().unwrap());
    }

    #[test]
    fn wrong_settings_are_named_with_their_mend() {
        for (settings, part) in [
            (json!({ "lenght": 40 }), "did you mean `length`?"),
            (json!({ "length": 7 }), "8 to 4096"),
            (json!({ "length": 4097 }), "8 to 4096"),
            (json!({ "length": "40" }), "8 to 4096"),
            (json!({ "length": 1.5 }), "8 to 4096"),
            (json!({ "length": 10 }), "make it 11 or more"),
            (json!({ "length": 19, "alphabet": "0123456789", "first": "any" }), "make it 20 or more"),
            (json!({ "alphabet": "0123456789" }), "`first = \"any\"`"),
            (json!({ "alphabet": "" }), "fewer than two"),
            (json!({ "alphabet": "a" }), "fewer than two"),
            (json!({ "alphabet": "abca" }), "character 4 (`a`)"),
            (json!({ "alphabet": "ab cd" }), "character 3"),
            (json!({ "alphabet": "abé" }), "character 3"),
            (json!({ "alphabet": 5 }), "`alphabet` is not a text"),
            (json!({ "alphabet": "abc", "classes": ["lower"] }), "keep one"),
            (json!({ "classes": [] }), "names none"),
            (json!({ "classes": ["lower", "lower"] }), "twice"),
            (json!({ "classes": ["letters"] }), "`lower`, `upper`, `digit`, `symbol`"),
            (json!({ "classes": "lower" }), "list"),
            (json!({ "require": ["symbol"] }), "`require` names `symbol`"),
            (json!({ "first": "digit" }), "`first` is"),
        ] {
            let problem = rules(settings.clone()).unwrap_err();
            assert!(problem.contains(part), "{settings}: {problem}");
            assert!(!problem.contains('\n') && problem.len() < 200, "{problem}");
        }
    }

    #[test]
    fn enough_bits_are_enough_bits() {
        for (settings, shortest) in [
            (json!({ "length": 11 }), 11),
            (json!({ "length": 64, "alphabet": "ab", "first": "any" }), 64),
            (json!({ "length": 16, "alphabet": "0123456789abcdef", "first": "any" }), 16),
            // The first is one of six: 2.6 bits and not four.
            (json!({ "length": 17, "alphabet": "0123456789abcdef" }), 17),
        ] {
            assert_eq!(rules(settings.clone()).unwrap().shortest(), shortest, "{settings}");
        }
    }

    #[test]
    fn every_character_is_as_likely_as_any_other() {
        let rules = Rules::default();
        let many: Vec<Zeroizing<String>> = (0..3_200).map(|_| rules.generate().unwrap()).collect();
        let rest = many.iter().flat_map(|password| password.chars().skip(1));
        let found = chi_square(counted(rest, &rules.alphabet));
        assert!(found < bound(62), "{found}");
        let first = many.iter().flat_map(|password| password.chars().take(1));
        let found = chi_square(counted(first, &rules.letters()));
        assert!(found < bound(52), "{found}");
    }

    #[test]
    fn the_bound_would_find_what_a_bare_remainder_does() {
        let rules = Rules::default();
        let alphabet: Vec<char> = rules.alphabet.chars().collect();
        let mut bytes = vec![0_u8; 124_800];
        random(&mut bytes).unwrap();
        let biased = bytes.iter().map(|byte| alphabet[usize::from(*byte) % alphabet.len()]);
        assert!(chi_square(counted(biased, &rules.alphabet)) > bound(62));
    }

    #[test]
    fn every_password_with_the_required_classes_is_as_likely_as_any_other() {
        // Too short to be accepted from settings: short enough that each can be counted.
        let rules = Rules {
            length: 3,
            alphabet: "ab12".to_owned(),
            require: vec![Class::Lower, Class::Digit],
            letter_first: false,
        };
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        for _ in 0..48_000 {
            *counts.entry(rules.generate().unwrap().to_string()).or_default() += 1;
        }
        // 4³ less the 2³ without a digit and the 2³ without a letter.
        assert_eq!(counts.len(), 48);
        let found = chi_square(counts.into_values());
        assert!(found < bound(48), "{found}");
    }

    #[test]
    fn a_class_may_be_rare_and_is_there_all_the_same() {
        let rules = rules(json!({
            "length": 13, "alphabet": "aA1!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "first": "any",
            "require": ["lower", "upper", "digit", "symbol"],
        }))
        .unwrap();
        for _ in 0..50 {
            let password = rules.generate().unwrap();
            assert!(Class::ALL.into_iter().all(|class| class.is_in(&password)));
        }
    }

    #[test]
    fn stricter_rules_have_no_symbols_and_are_shorter() {
        let wide =
            rules(json!({ "length": 64, "classes": ["lower", "digit", "symbol"], "first": "any" })).unwrap();
        let stricter = wide.stricter();
        assert_eq!(stricter.length, 32);
        assert_eq!(
            stricter.alphabet, "abcdefghijklmnopqrstuvwxyz0123456789",
            "nothing that was not permitted before"
        );
        assert!(stricter.letter_first);
        assert_eq!(stricter.stricter(), stricter);

        let symbols =
            rules(json!({ "length": 100, "alphabet": "!#%&()*+", "first": "any" })).unwrap().stricter();
        assert_eq!(symbols, Rules { length: 32, ..Rules::default() });

        let required = rules(json!({ "alphabet": "abc-_", "require": ["symbol"] })).unwrap().stricter();
        assert!(required.alphabet.contains('-'), "what must be there stays");

        let two = rules(json!({ "length": 80, "alphabet": "xy", "first": "any" })).unwrap().stricter();
        assert_eq!(two.length, 64, "32 would be too easy to guess");
        assert_eq!(rules(json!({ "length": 20 })).unwrap().stricter().length, 20);
    }

    #[test]
    fn debug_shows_no_password() {
        let password = Rules::default().generate().unwrap();
        assert!(!format!("{password:?}").contains(password.as_str()));
    }

    proptest! {
        #[test]
        fn passwords_keep_to_the_rules(
            length in 8_usize..200,
            alphabet in proptest::sample::subsequence((b'!'..=b'~').collect::<Vec<_>>(), 2..94),
            require in proptest::sample::subsequence(vec!["lower", "upper", "digit", "symbol"], 0..=4),
            first in proptest::sample::select(vec!["letter", "any"]),
        ) {
            let alphabet = String::from_utf8(alphabet).unwrap();
            let settings = json!({
                "length": length, "alphabet": alphabet.as_str(), "require": require.as_slice(), "first": first,
            });
            let Ok(rules) = rules(settings) else { return Ok(()) };
            for rules in [rules.stricter(), rules] {
                prop_assert!(rules.check().is_ok(), "{:?}", rules);
                let password = rules.generate().unwrap();
                prop_assert_eq!(password.len(), rules.length);
                prop_assert!(password.chars().all(|character| rules.alphabet.contains(character)));
                prop_assert!(rules.require.iter().all(|class| class.is_in(&password)));
                prop_assert!(!rules.letter_first || password.as_bytes()[0].is_ascii_alphabetic());
            }
        }
    }
}
