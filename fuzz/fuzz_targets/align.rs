//! Two vocabularies, ids, stop ids and rules for invalid bytes from arbitrary bytes, against the laws.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xtokmap::{Aligner, ByteTable, Error, Ids, Invalid, Kind, Layout, Rows, Side};
use xtokmap_fuzz::{aligned, check, ends, spelled, Input, Token};

/// A vocabulary of at most 16 tokens, and its tokens as `check` sees them.
fn vocabulary(input: &mut Input<'_>) -> (ByteTable, Vec<Token>) {
    let invalid = input.invalid();
    let mut tokens = vec![];
    let mut stop_ids = vec![];
    for id in 0..1 + u32::from(input.byte() % 16) {
        let what = input.byte();
        let bytes = (what % 8 > 0).then(|| input.bytes(usize::from(what % 8 - 1)));
        if bytes.is_none() && what >= 128 {
            stop_ids.push(id);
        }
        tokens.push(bytes);
    }
    let as_tokens = |(id, bytes): (usize, &Option<&[u8]>)| Token {
        bytes: bytes.unwrap_or_default().to_vec(),
        stop: stop_ids.contains(&(id as u32)),
    };
    let plain = tokens.iter().enumerate().map(as_tokens).collect();
    let table = ByteTable::from_tokens(tokens).unwrap().with_stop_ids(stop_ids).unwrap().with_invalid(invalid);
    (table, plain)
}

fn read(ids: &[u32], tokens: &[Token]) -> Vec<Token> {
    ids.iter().map(|&id| tokens[id as usize].clone()).collect()
}

/// What lies between the runs of tokens without bytes in which there is a stop token.
fn turns(tokens: &[Token]) -> Vec<Vec<u8>> {
    let mut turns = vec![vec![]];
    let mut open = true;
    for token in tokens {
        if token.stop && open {
            turns.push(vec![]);
            open = false;
        } else if !token.bytes.is_empty() {
            turns.last_mut().unwrap().extend(&token.bytes);
            open = true;
        }
    }
    turns
}

fn check_row(aligner: &Aligner, vocabularies: [&[Token]; 2], s: &[u32], t: &[u32]) {
    let forth = aligner.align(s, t).unwrap();
    let (student, teacher) = (read(s, vocabularies[0]), read(t, vocabularies[1]));
    // Only the bytes count, not the ids.
    assert_eq!(aligned(&student, &teacher, [aligner.student().invalid(), aligner.teacher().invalid()]), forth);

    let (x, y) = (turns(&student), turns(&teacher));
    let equal = if x.len() == y.len() { x == y } else { x.concat() == y.concat() };
    if equal {
        // Law 3: the chunks are what lies between the common ends.
        assert!(!forth.kind.contains(&Kind::Rewritten));
        let ended = |tokens: &[Token]| {
            let ends = ends(tokens).into_iter().zip(tokens).filter(|(_, token)| !token.bytes.is_empty());
            ends.map(|(end, _)| end).collect::<Vec<_>>()
        };
        let other = ended(&teacher);
        let common = ended(&student).into_iter().filter(|end| other.contains(end)).count();
        assert_eq!(forth.kind.iter().filter(|&&kind| kind != Kind::Stop).count(), common);
    }
    let (student_cu, teacher_cu) = ([0, s.len() as i64], [0, t.len() as i64]);
    let rows = |ids, cu| Rows::new(Ids::U32(ids), Layout::Ragged(cu)).unwrap();
    match aligner.align_batch(rows(s, &student_cu), rows(t, &teacher_cu), true) {
        Ok(batch) => {
            assert!(equal);
            assert_eq!(batch.flat, forth);
        }
        Err(error @ Error::ByteMismatch(_)) => {
            assert!(!equal && !error.to_string().is_empty());
            let Error::ByteMismatch(at) = error else { unreachable!() };
            let (x, y) = (x.concat(), y.concat());
            assert_eq!(x[..at.byte], y[..at.byte]);
            assert!(at.student.is_some() || at.teacher.is_some());
        }
        Err(error) => panic!("{error}"),
    }

    // Law 5.
    let own = Aligner::new(aligner.student().clone(), aligner.student().clone()).unwrap().align(s, s).unwrap();
    assert!(own.kind.iter().all(|kind| matches!(kind, Kind::OneToOne | Kind::Stop)));
    check(&own, &student, &student);

    let texts = aligner.decode_lossy(Side::Student, rows(s, &student_cu)).unwrap();
    let texts: Vec<_> = texts.into_iter().map(|row| row.0).collect();
    assert_eq!(texts[0].len(), 1 + student.iter().filter(|token| token.stop).count());
    if texts[0].len() == 1 && aligner.student().invalid() == Invalid::Maximal {
        assert_eq!(texts[0][0], String::from_utf8_lossy(&spelled(&student)));
    }
}

/// Rows as they come, padded on either side with ids that no vocabulary has.
fn padded(rows: &[Vec<u32>], left: bool) -> (usize, Vec<i64>, Vec<bool>) {
    let width = rows.iter().map(Vec::len).max().unwrap_or(0) + 1;
    let (mut ids, mut mask) = (vec![], vec![]);
    for row in rows {
        let pad = width - row.len();
        let real = row.iter().map(|&id| (i64::from(id), true));
        let padding = std::iter::repeat_n((-100, false), pad);
        let both: Vec<(i64, bool)> = if left { padding.chain(real).collect() } else { real.chain(padding).collect() };
        ids.extend(both.iter().map(|p| p.0));
        mask.extend(both.iter().map(|p| p.1));
    }
    (width, ids, mask)
}

fn check_batch(aligner: &Aligner, student: &[Vec<u32>], teacher: &[Vec<u32>]) {
    let cu = |rows: &[Vec<u32>]| {
        let mut cu = vec![0i64];
        rows.iter().for_each(|row| cu.push(cu[cu.len() - 1] + row.len() as i64));
        cu
    };
    let (student_cu, teacher_cu) = (cu(student), cu(teacher));
    let (s, t) = (student.concat(), teacher.concat());
    let rows = |ids, cu| Rows::new(Ids::U32(ids), Layout::Ragged(cu)).unwrap();
    let batch = aligner.align_batch(rows(&s, &student_cu), rows(&t, &teacher_cu), false).unwrap();
    let ((ws, si, sm), (wt, ti, tm)) = (padded(student, true), padded(teacher, false));
    let rows = |ids, width, mask| Rows::new(Ids::I64(ids), Layout::Padded { width, mask }).unwrap();
    assert_eq!(aligner.align_batch(rows(&si, ws, &sm), rows(&ti, wt, &tm), false).unwrap(), batch);
    let (mut i, mut j, mut g) = (0, 0, 0);
    for (b, (s, t)) in student.iter().zip(teacher).enumerate() {
        let alone = aligner.align(s, t).unwrap();
        let (m, n, chunks) = (i + s.len(), j + t.len(), g + alone.kind.len());
        let at = (batch.student_cu[b] as usize, batch.teacher_cu[b] as usize, batch.chunk_cu[b] as usize);
        assert_eq!(at, (i, j, g));
        assert_eq!(batch.flat.kind[g..chunks], alone.kind);
        assert_eq!(batch.flat.student_ptr[g + b..=chunks + b], alone.student_ptr);
        assert_eq!(batch.flat.teacher_ptr[g + b..=chunks + b], alone.teacher_ptr);
        assert_eq!(batch.flat.student_chunk[i..m], alone.student_chunk);
        assert_eq!(batch.flat.student_end[i..m], alone.student_end);
        assert_eq!(batch.flat.teacher_pos[i..m], alone.teacher_pos);
        assert_eq!(batch.flat.teacher_off[i..m], alone.teacher_off);
        assert_eq!(batch.flat.teacher_chunk[j..n], alone.teacher_chunk);
        assert_eq!(batch.flat.teacher_end[j..n], alone.teacher_end);
        (i, j, g) = (m, n, chunks);
    }
}

fuzz_target!(init: {
    std::env::set_var("RAYON_NUM_THREADS", "1");
}, |data: &[u8]| {
    let mut input = Input(data);
    let mode = input.byte();
    let (s, student_tokens) = vocabulary(&mut input);
    let (t, teacher_tokens) = if mode & 1 == 0 { (s.clone(), student_tokens.clone()) } else { vocabulary(&mut input) };
    let (m, n) = (s.len() as u32, t.len() as u32);
    let aligner = Aligner::new(s, t).unwrap();
    let vocabularies = [student_tokens.as_slice(), teacher_tokens.as_slice()];

    if mode & 6 == 6 {
        // Any ids, any layout: an error or an alignment.
        let cu: Vec<i64> = input.bytes(usize::from(mode >> 4)).iter().map(|&b| i64::from(b as i8)).collect();
        let width = usize::from(input.byte());
        let numbers: Vec<i64> = input.0.chunks(2).map(|c| i64::from(c[0] as i8) << (c.len() * 8 - 8)).collect();
        let mask: Vec<bool> = numbers.iter().map(|x| x & 3 > 0).collect();
        let layouts = [Layout::Ragged(&cu), Layout::Padded { width, mask: &mask }];
        let small: Vec<i32> = numbers.iter().map(|&x| x as i32).collect();
        for (student, teacher) in layouts.into_iter().zip(layouts.into_iter().rev()) {
            let student = Rows::new(Ids::I64(&numbers), student);
            let teacher = Rows::new(Ids::I32(&small), teacher);
            if let (Ok(student), Ok(teacher)) = (student, teacher) {
                match aligner.align_batch(student, teacher, mode & 8 > 0) {
                    Ok(batch) => assert_eq!(batch.chunk_cu.len(), student.len() + 1),
                    Err(error) => assert!(!error.to_string().is_empty()),
                }
            }
        }
        return;
    }

    // Both sides' ids, one after the other, or in rows.
    let rows = if mode & 2 == 0 { 1 } else { 1 + usize::from(input.byte() % 4) };
    let (mut student, mut teacher) = (vec![], vec![]);
    for row in 0..rows {
        let left = input.0.len() / (rows - row);
        let own = usize::from(input.byte()) * left / 255;
        student.push(input.bytes(own).iter().map(|&b| u32::from(b) % m).collect::<Vec<_>>());
        let other = left.saturating_sub(own + 1);
        teacher.push(input.bytes(other).iter().map(|&b| u32::from(b) % n).collect::<Vec<_>>());
    }
    for (s, t) in student.iter().zip(&teacher) {
        check_row(&aligner, vocabularies, s, t);
    }
    if rows > 1 {
        check_batch(&aligner, &student, &teacher);
    }
});
