//! What the readers of tokenizer files do for every token or merge, where Python would take most of the time.

use std::borrow::Cow;

/// The byte for a character of the GPT-2 alphabet, in which every byte is one printable character.
fn byte_of(c: char) -> Option<u8> {
    match c as u32 {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(code as u8),
        // The others in their order: 0 to 0x20, 0x7F to 0xA0, 0xAD.
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// How a decoder makes bytes of a token's text.
#[derive(Clone, Copy)]
pub enum Spelling {
    /// Its UTF-8.
    Plain,
    /// A character for each byte; one outside that alphabet makes all of the token plain text.
    ByteLevel,
    /// `<0x0A>` is one byte; all else is plain text.
    BytePieces,
}

/// The bytes of a token inside a text, after its replacements.
pub fn spell(token: &str, replacements: &[(String, String)], spelling: Spelling) -> Vec<u8> {
    let mut text = Cow::Borrowed(token);
    for (old, new) in replacements {
        if text.contains(old) {
            text = text.replace(old, new).into();
        }
    }
    let changed = match spelling {
        Spelling::Plain => None,
        Spelling::ByteLevel => text.chars().map(byte_of).collect(),
        Spelling::BytePieces => byte_piece(&text).map(|byte| vec![byte]),
    };
    changed.unwrap_or_else(|| text.into_owned().into_bytes())
}

fn byte_piece(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    // from_str_radix also takes a sign
    let plain = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    plain.then(|| u8::from_str_radix(digits, 16).ok())?
}

/// Where a JSON array of strings, or of arrays of strings, ends that starts at `start`; `None` for anything else, and
/// for what is no valid JSON.
pub fn json_strings_end(json: &[u8], start: usize) -> Option<usize> {
    let mut scan = Scan { json, at: start };
    scan.array(|scan| {
        let mark = scan.mark()?;
        scan.at -= 1;
        if mark == b'[' {
            scan.array(Scan::string)
        } else {
            scan.string()
        }
    })?;
    std::str::from_utf8(&json[start..scan.at]).ok()?;
    Some(scan.at)
}

/// The strings and integers of the JSON object that starts at `start`, in order, and where it ends; `None` for an
/// object of anything else, and for what is no valid JSON or no valid Unicode.
#[allow(clippy::type_complexity)]
pub fn json_ids(json: &[u8], start: usize) -> Option<(Vec<(Cow<'_, str>, i64)>, usize)> {
    let mut scan = Scan { json, at: start };
    let mut all = vec![];
    (scan.mark()? == b'{').then_some(())?;
    if scan.mark()? == b'}' {
        return Some((all, scan.at));
    }
    scan.at -= 1;
    loop {
        let from = scan.at;
        scan.string()?;
        let name = unescaped(std::str::from_utf8(&json[from..scan.at]).ok()?.trim_start())?;
        (scan.mark()? == b':').then_some(())?;
        all.push((name, scan.integer()?));
        match scan.mark()? {
            b',' => {}
            b'}' => return Some((all, scan.at)),
            _ => return None,
        }
    }
}

/// The text of a JSON string, given with its quotes. Half a surrogate pair is no text.
fn unescaped(quoted: &str) -> Option<Cow<'_, str>> {
    let mut rest = quoted.strip_prefix('"')?.strip_suffix('"')?;
    if !rest.contains('\\') {
        return Some(rest.into());
    }
    let mut units = Vec::new();
    while let Some((before, after)) = rest.split_once('\\') {
        units.extend(before.encode_utf16());
        let escape = after.chars().next()?;
        let size = if escape == 'u' { 5 } else { 1 };
        units.push(match escape {
            'b' => 0x08,
            'f' => 0x0C,
            'n' => 0x0A,
            'r' => 0x0D,
            't' => 0x09,
            'u' => u16::from_str_radix(after.get(1..5)?, 16).ok()?,
            other => u16::try_from(u32::from(other)).ok()?,
        });
        rest = after.get(size..)?;
    }
    units.extend(rest.encode_utf16());
    String::from_utf16(&units).ok().map(Cow::Owned)
}

struct Scan<'a> {
    json: &'a [u8],
    at: usize,
}

impl Scan<'_> {
    fn next(&mut self) -> Option<u8> {
        let byte = *self.json.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    /// The next byte that is no white space.
    fn mark(&mut self) -> Option<u8> {
        self.skip_to(|byte| !matches!(byte, b' ' | b'\n' | b'\r' | b'\t'))
    }

    /// The next byte of which `found` is true.
    fn skip_to(&mut self, found: impl Fn(u8) -> bool) -> Option<u8> {
        let skipped = self.json.get(self.at..)?.iter().position(|&byte| found(byte))?;
        self.at += skipped;
        self.next()
    }

    fn array(&mut self, item: impl Fn(&mut Self) -> Option<()>) -> Option<()> {
        (self.mark()? == b'[').then_some(())?;
        if self.mark()? == b']' {
            return Some(());
        }
        self.at -= 1;
        loop {
            item(self)?;
            match self.mark()? {
                b',' => {}
                b']' => return Some(()),
                _ => return None,
            }
        }
    }

    fn integer(&mut self) -> Option<i64> {
        let minus = self.mark()? == b'-';
        self.at -= usize::from(!minus);
        let digits = self.json[self.at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let text = std::str::from_utf8(&self.json[self.at..self.at + digits]).ok()?;
        self.at += digits;
        let number: i64 = text.parse().ok().filter(|_| digits == 1 || !text.starts_with('0'))?;
        Some(if minus { -number } else { number })
    }

    fn string(&mut self) -> Option<()> {
        (self.mark()? == b'"').then_some(())?;
        loop {
            match self.skip_to(|byte| byte < 0x20 || byte == b'"' || byte == b'\\')? {
                b'"' => return Some(()),
                b'\\' => match self.next()? {
                    b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {}
                    b'u' => (0..4).try_for_each(|_| self.next()?.is_ascii_hexdigit().then_some(()))?,
                    _ => return None,
                },
                _ => return None,
            }
        }
    }
}

/// Goes through the strings of an array in a GGUF file, each behind its length in 8 bytes, and says where the last of
/// them ends; `None` where the file ends first.
pub fn gguf_strings<'a>(
    data: &'a [u8],
    start: usize,
    count: u64,
    big_endian: bool,
    mut each: impl FnMut(&'a [u8]),
) -> Option<usize> {
    let mut at = start;
    for _ in 0..count {
        let (size, rest) = data.get(at..)?.split_first_chunk()?;
        let size = if big_endian { u64::from_be_bytes(*size) } else { u64::from_le_bytes(*size) };
        let size = usize::try_from(size).ok()?;
        each(rest.get(..size)?);
        at += 8 + size;
    }
    Some(at)
}
