//! Two arbitrary texts, cut into tokens anyhow: the laws hold, and text that follows them on both sides is aligned.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xtokmap::{Invalid, Kind};
use xtokmap_fuzz::{aligned, cut, ends, Input, Token};

/// Bytes at the start of the common tail that may still look like the end of what came before.
const SLACK: i32 = 96;
const TAIL: usize = 300;

/// Letters, digits and a few characters of several bytes, told from the texts so that no text can hold them.
fn tail(texts: [&[u8]; 2], mut push: impl FnMut(char)) -> u64 {
    let mut state = 0xcbf2_9ce4_8422_2325_u64;
    for &byte in texts.concat().iter() {
        state = (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let alphabet: Vec<char> = "abcdefghijklmnopqrstuvwxyz0123456789.,-+/äß漢字语言жщ💡🦀".chars().collect();
    for _ in 0..TAIL {
        push(alphabet[next(&mut state) as usize % alphabet.len()]);
    }
    state
}

fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed ^ (mixed >> 27)) >> 16
}

fn check_tail(x: &[u8], y: &[u8], mut student: Vec<Token>, mut teacher: Vec<Token>, invalid: [Invalid; 2]) {
    let mut common = String::new();
    let mut state = tail([x, y], |c| common.push(c));
    let mut more = |tokens: &mut Vec<Token>| {
        let lengths: Vec<u8> = (0..common.len()).map(|_| 1 + (next(&mut state) % 5) as u8).collect();
        tokens.extend(cut(common.as_bytes(), &lengths).into_iter().filter(|token| !token.bytes.is_empty()));
    };
    more(&mut student);
    more(&mut teacher);
    let a = aligned(&student, &teacher, invalid);

    // Every end that both sides have in the tail is the end of a chunk, and every chunk behind it has equal bytes.
    let (from_x, from_y) = (x.len() as i32, y.len() as i32);
    let (student_ends, teacher_ends) = (ends(&student), ends(&teacher));
    let mut first = None;
    for (i, end) in student_ends.iter().enumerate().filter(|(_, &end)| end - from_x > SLACK) {
        if let Ok(j) = teacher_ends.binary_search(&(end - from_x + from_y)) {
            let (g, h) = (a.student_chunk[i], a.teacher_chunk[j]);
            assert!(g >= 0 && g == h, "byte {} of the tail is not aligned", end - from_x);
            assert_eq!(a.student_ptr[g as usize + 1], i as i32 + 1, "byte {} of the tail ends no chunk", end - from_x);
            assert_eq!(a.teacher_ptr[g as usize + 1], j as i32 + 1);
            first = first.or(Some(g as usize + 1));
        }
    }
    if let Some(first) = first {
        assert!(!a.kind[first..].contains(&Kind::Rewritten));
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let invalid = [input.invalid(), input.invalid()];
    let mode = input.byte();
    let counts = [input.byte() % 32, input.byte() % 32].map(usize::from);
    let lengths = counts.map(|n| input.bytes(n));
    let (x, y): (Vec<u8>, Vec<u8>);
    if mode % 2 == 0 {
        let at = usize::from(input.number()) % (input.0.len() + 1);
        let (a, b) = input.0.split_at(at);
        (x, y) = (a.to_vec(), b.to_vec());
    } else {
        // The second text is the first one, edited: at a place so many bytes go, and others come.
        let mut edits = vec![];
        for _ in 0..mode / 2 % 8 {
            let (place, gone, come) = (input.number(), input.byte(), input.byte());
            edits.push((usize::from(place), usize::from(gone), input.bytes(usize::from(come % 64))));
        }
        let mut text = input.0.to_vec();
        for (place, gone, come) in edits {
            let from = place % (text.len() + 1);
            let to = (from + gone).min(text.len());
            text.splice(from..to, come.iter().copied());
        }
        (x, y) = (input.0.to_vec(), text);
    }
    let (student, teacher) = (cut(&x, lengths[0]), cut(&y, lengths[1]));
    aligned(&student, &teacher, invalid);
    check_tail(&x, &y, student, teacher, invalid);
});
